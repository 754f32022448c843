"""Suite of plain decoding: speed against the limits."""

from collections.abc import Mapping

from pr1_jax.bench import timing
from pr1_jax.bench.shapes import Bench
from pr1_jax.model import costs
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings
from pr1_jax.system.tables import Table

_NOTE = (
    "limit: the larger of FLOPs / peak and bytes / bandwidth, step by step; bytes are "
    "the weights once a step and the used keys and values."
)


def sampling(bench: Bench) -> list[Table]:
    """Measures sampling without blocks: as many prompts as rows, all at full length."""
    sizes, config = bench.sizes, bench.config
    rows, prompt, response = sizes.rows, sizes.prompt_tokens, sizes.response_tokens
    settings = Settings(
        max_prompt_tokens=prompt, max_response_tokens=response, max_blocks=0
    )
    batching = Batching(rows=rows)
    sampler = Sampler(bench.backend, bench.endless_vocab, settings, batching)
    prompts = bench.prompts([prompt] * rows)
    params = bench.params  # not among what the first call compiles

    def call() -> Mapping[str, float]:
        _, figures = sampler.sample(params, prompts, 1, bench.key)
        return {
            "prefill_sec": figures.prefill_sec,
            "decode_sec": figures.decode_sec,
            "step_ms": 1e3 * figures.decode_sec / figures.decode_steps,
        }

    runs = timing.alternate({"": call}, bench.repeats)[""]
    prefill = costs.prefill(config, rows=rows, tokens=prompt)
    prefill_sec = prefill.seconds(bench.limits)
    decode_sec = costs.decode_seconds(
        config, bench.limits, rows=rows, prompt=prompt, tokens=response
    )
    tokens = rows * response
    row = lambda what, spread, limit, count: {
        "part": what,
        "seconds": spread,
        "limit seconds": limit,
        "share of limit": spread.rate(limit),
        "tokens per second": spread.rate(count),
    }
    table = [
        row("all", runs.sec, prefill_sec + decode_sec, tokens),
        row("prefill", runs["prefill_sec"], prefill_sec, rows * prompt),
        row("decode", runs["decode_sec"], decode_sec, tokens),
    ]
    table[2]["ms per step"] = runs["step_ms"]
    table[2]["limit ms per step"] = 1e3 * decode_sec / response
    table[0]["first call adds seconds"] = runs.compile_sec
    title = f"{rows} prompts × {prompt} tokens → {response} tokens"
    return [Table(title, table, _NOTE)]
