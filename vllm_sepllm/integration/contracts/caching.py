"""vLLM names that prefix caching relies on (see contracts.py)."""

from vllm_sepllm.integration.contracts.contract import Contract, fields

_COORDINATOR = "vllm.v1.core.kv_cache_coordinator"
_KV = "vllm.v1.core.kv_cache_manager"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_UTILS = "vllm.v1.core.kv_cache_utils"
_REQUEST = "vllm.v1.request:Request"

CACHING = (
    Contract(
        f"{_SCHEDULER}._get_local_prefix_cache_hit",
        "overridden: says whose prefix is looked up, which vLLM's managers are not told",
        ("request",),
    ),
    Contract(
        f"{_SCHEDULER}.schedule",
        "overridden: requests whose tail becomes a ring are preempted before it",
        ("throttle_prefills",),
    ),
    Contract(
        f"{_SCHEDULER}._preempt_request",
        "called: the request begins anew",
        ("request", "timestamp", "drop_stale_output"),
    ),
    *fields(
        _SCHEDULER,
        "written where a request is preempted",
        *("prev_step_scheduled_req_ids", "kv_holding_waiting", "_pause_state"),
    ),
    Contract(
        f"{_MANAGER}.add_local_computed_blocks",
        "overridden: remembers which blocks of a hit the request must copy",
        (
            *("request_id", "new_computed_blocks", "num_local_computed_tokens"),
            "num_external_computed_tokens",
        ),
    ),
    Contract(
        f"{_MANAGER}.pop_blocks_for_free",
        "overridden: the blocks of a request that ends are a checkpoint",
        ("request_id",),
    ),
    Contract(
        f"{_MANAGER}.take_pending_cow_copies",
        "overridden: vLLM asks once all requests of a step are scheduled; we add copies of ours",
        (),
    ),
    Contract(f"{_MANAGER}._pending_cow_copies", "extended: (source, copy), each with a reference"),
    Contract(
        f"{_COORDINATOR}:HybridKVCacheCoordinator.attention_groups",
        "written: asks our managers in place of their class",
    ),
    *fields(
        f"{_COORDINATOR}:SpecGroup",
        "read and replaced: who finds the hits of which groups",
        *("manager_cls", "group_ids"),
    ),
    Contract(f"{_COORDINATOR}:KVCacheCoordinator.scheduler_block_size", "read: where hits end"),
    Contract(
        f"{_COORDINATOR}:KVCacheCoordinator.get_num_blocks_to_allocate",
        "called: does a request with its hit still fit?",
        (
            *("request_id", "num_tokens", "new_computed_blocks", "num_encoder_tokens"),
            *("total_computed_tokens", "num_local_computed_tokens", "num_tokens_main_model"),
            *("apply_admission_cap", "prefill_end"),
        ),
    ),
    *fields(f"{_KV}:KVCacheManager", "read", "watermark_blocks", "empty_kv_cache_blocks"),
    Contract(f"{_KV}:KVCacheBlocks.blocks", "read: a hit, block by block"),
    Contract(
        f"{_MANAGER}.cache_blocks",
        "overridden: nothing is cached by token position",
        ("request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    Contract(
        f"{_MANAGER}._apply_cow",
        "called: vLLM's own copy-on-write of a block that a hit shares",
        ("request_id", "block_idx", "source_block", "cow_block"),
    ),
    Contract(f"{_MANAGER}._get_num_evictable_blocks", "called", ("blocks",)),
    *fields(
        _MANAGER, "read", "block_pool", "kv_cache_group_id", "enable_caching", "num_cached_block"
    ),
    Contract(f"{_POOL}.get_new_blocks", "called: a checkpoint's own blocks", ("num_blocks",)),
    Contract(
        f"{_POOL}.get_cached_block",
        "called: blocks of at most a + n tokens are found as vLLM finds them",
        ("block_hash", "kv_cache_group_ids"),
    ),
    Contract(f"{_POOL}.evict_blocks", "called: a block is overwritten", ("block_ids",)),
    Contract(f"{_POOL}.hash_block_size", "read: tokens of each of a request's hashes"),
    Contract(f"{_POOL}.free_blocks", "called: they are evictable at once", ("ordered_blocks",)),
    Contract(f"{_POOL}.touch", "called: a hit's blocks are in use", ("blocks",)),
    Contract(f"{_POOL}.get_num_free_blocks", "called", ()),
    Contract(f"{_POOL}.num_gpu_blocks", "read: bounds the list of checkpoints"),
    Contract(
        f"{_POOL}._insert_block_hash",
        "called: a block with a key is evicted last, and loses the key when it is reused",
        ("block_hash_with_group_id", "block", "num_tokens"),
    ),
    Contract(
        f"{_UTILS}:make_block_hash_with_group_id", "called: such a key", ("block_hash", "group_id")
    ),
    Contract(f"{_UTILS}:get_block_hash", "called: the hash in such a key", ("key",)),
    Contract(f"{_UTILS}:KVCacheBlock.block_hash", "read: whether a checkpoint is whole"),
    Contract(f"{_UTILS}:KVCacheBlock.block_hash_num_tokens", "read: moved with the key"),
    Contract(f"{_UTILS}:KVCacheBlock.ref_cnt", "raised while vLLM copies the block"),
    *fields(
        _REQUEST,
        "read: where checkpoints are left",
        *("block_hashes", "num_prompt_tokens", "num_tokens", "max_tokens", "resumable"),
        "mm_features",
    ),
    Contract(
        f"{_UTILS}:get_request_block_hasher",
        "called by the rig, as vLLM's engine core does",
        ("hash_block_size", "caching_hash_fn"),
    ),
    Contract(f"{_UTILS}:init_none_hash", "called by the rig, before any hash", ("hash_fn",)),
    Contract("vllm.utils.hashing:sha256", "given to both by the rig", ("input",)),
)
