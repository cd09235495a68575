"""See :mod:`nixl._api`."""
