"""The probe reports the most that was held, and changes nothing."""

from types import SimpleNamespace

from vllm_sepllm.demo.probe import Probe


class FakeScheduler:
    """The first request grows to 3 blocks and ends; the second starts over with fewer."""

    def __init__(self) -> None:
        group = SimpleNamespace(
            layer_names=["0", "1", "2"], kv_cache_spec=SimpleNamespace(page_size_bytes=10)
        )
        self.kv_cache_config = SimpleNamespace(num_blocks=8, kv_cache_groups=[group])
        self.kv_cache_manager = self
        self.waiting: list[object] = []
        self.running: list[object] = []
        self._steps = iter([{"a": [1]}, {"a": [1, 2, 3], "b": [4, 5]}, {"b": [4]}, {}])

    def schedule(self) -> str:
        self._held = next(self._steps)
        self.running = [
            SimpleNamespace(
                request_id=name, num_computed_tokens=0, num_prompt_tokens=9, num_output_tokens=0
            )
            for name in self._held
        ]
        return "output"

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return (self._held[request_id],)


def test_probe_keeps_the_peaks_and_passes_the_output_on(capsys) -> None:
    scheduler = FakeScheduler()
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    probe = Probe(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), 0.0)
    assert [scheduler.schedule() for _ in range(4)] == ["output"] * 4
    assert probe.usage.blocks == {"a": 3, "b": 2}
    assert probe.usage.num_running == 2
    assert probe.usage.num_blocks == 8
    assert probe.usage.block_bytes == 30
    assert "2 running, 0 waiting: prompt 0 %, prompt 0 %" in capsys.readouterr().out
