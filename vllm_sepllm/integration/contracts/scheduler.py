"""Attributes of vLLM's schedulers and managers that we write or fill."""

from vllm_sepllm.integration.contracts.contract import by_hand

CONTRACTS = by_hand(
    {
        "vllm.v1.core.sched.scheduler:Scheduler": {
            "grammar_compile_error_reqs: set[str] or dict[str, RequestError]": (
                "refused requests go in: vLLM ends them with an error after the step"
            ),
            "prev_step_scheduled_req_ids: set[str]": (
                "a request that begins anew leaves it, so that workers see it come back"
            ),
            "running: list[Request]": "a request that begins anew leaves it",
            "need_mamba_block_aligned_split": (
                "set: chunks end where positions are renumbered; vLLM then asks the method below"
            ),
        },
        "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator": {
            "attention_groups: list[SpecGroup]": "ours ask a manager in place of its class",
        },
        "vllm.v1.core.kv_cache_coordinator:SpecGroup": {
            "manager_cls: type[SingleTypeKVCacheManager]": "replaced by a manager",
        },
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": {
            "_pending_cow_copies: list[tuple[KVCacheBlock, KVCacheBlock]]": (
                "extended: (source, copy), each with a reference until vLLM has copied"
            ),
            "num_cached_block: dict[str, int]": "vLLM's mark of a request that is past its lookup",
        },
        "vllm.distributed.kv_events:BlockStored": {
            "group_idx, block_hashes, token_ids, extra_keys": (
                "set on copies: of another group, or of several blocks"
            ),
        },
        "vllm.v1.core.kv_cache_manager:KVCacheManager": {
            "kv_cache_event_metadata": (
                "set: the kinds of groups that KV events name; take_events writes them into events"
            ),
        },
        "vllm.v1.core.block_pool:BlockPool": {
            "kv_event_queue: list[KVCacheEvent]": "extended: events of our groups",
            "_build_block_stored_event": "events have the fields that vLLM's have",
        },
        "vllm.v1.core.kv_cache_utils:KVCacheBlock": {
            "ref_cnt: int": "raised while vLLM copies the block",
        },
        "vllm.v1.request:Request": {
            "block_hashes: list[BlockHash]": "emptied: made once more with our cache_salt",
            "cache_salt: str | None": "keeps policies apart in layers of other kinds",
            "num_computed_tokens: int": "0 for a streaming session that begins anew",
        },
    }
)
