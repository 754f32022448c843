"""The objectives beside those of TRL and verl, on one small case: largest differences.

    git clone https://github.com/huggingface/trl && git clone https://github.com/volcengine/verl
    pip install torch
    python -m tests.programs.objective_peers --trl=trl --verl=verl

Their functions are taken out of their files, so that neither needs to be installed. TRL's
loss is a method of its trainer, for which a stand-in gives the log-probs.
"""

import ast
import math
import pathlib
import types
from collections import defaultdict

import jax
import numpy as np
import torch
from absl import app, flags

from pr1_jax import losses
from pr1_jax.system import tables

_TRL = flags.DEFINE_string("trl", None, "Folder of TRL.", required=True)
_VERL = flags.DEFINE_string("verl", None, "Folder of verl.", required=True)
CAP, CLIP_LOW, CLIP_HIGH, KL_COEF, CONSTANT = 1.3, 0.2, 0.28, 0.3, 20
Stub = types.SimpleNamespace
_COLUMNS = ("peer", "objective", "aggregation", "dual_clip", "importance", "kl_coef")
_COLUMNS += ("value", "gradient")


def case() -> dict[str, np.ndarray]:
    """Eight responses of up to twelve tokens, some of which are not trained."""
    rng = np.random.default_rng(1)
    shape = (8, 12)
    mask = np.arange(12) < rng.integers(3, 13, 8)[:, None]
    mask &= rng.random(shape) < 0.85
    mask[:, 0] = True
    old = rng.normal(-1.5, 0.6, shape)
    moved = {"logps": 0.3, "ref": 0.4, "sampled": 0.25}
    arrays = {name: old + rng.normal(0, s, shape) for name, s in moved.items()}
    arrays |= {"old": old, "advantages": rng.normal(size=8)}
    return {"mask": mask, **{name: np.float32(x) for name, x in arrays.items()}}


def functions(path: pathlib.Path, *names: str, **scope) -> Stub:
    """Functions of a Python file, without its imports and their decorators."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)  # noqa: S102
    return Stub(**{name: scope[name] for name in names})


class _Fields(dict):
    __getattr__ = dict.__getitem__


def verl_losses(folder: pathlib.Path, x: dict[str, torch.Tensor]) -> dict:
    """Their losses as functions of log-probs, by what makes ours."""
    masked = functions(
        folder / "verl/utils/torch_functional.py",
        *("masked_sum", "masked_mean"),
        torch=torch,
    )
    names = ("vanilla", "gspo", "cispo")
    scope = {"ActorConfig": _Fields, "AlgoConfig": int, "verl_F": masked}
    found = functions(
        folder / "verl/trainer/ppo/core_algos.py",
        *("agg_loss", *(f"compute_policy_loss_{name}" for name in names)),
        torch=torch,
        **scope,
    )

    def loss(name, aggregation, dual_clip):
        config = _Fields(
            clip_ratio=CLIP_LOW,
            clip_ratio_low=CLIP_LOW,
            clip_ratio_high=CLIP_HIGH,
            clip_ratio_c=dual_clip or 1e9,
            global_batch_info={},
        )
        call = getattr(found, f"compute_policy_loss_{name}")
        advantages = x["advantages"][:, None].expand_as(x["mask"])
        mean = {"token_mean": "token-mean"}.get(aggregation, "seq-mean-token-mean")
        return lambda logps: call(
            *(x["old"], logps, advantages, x["mask"].float(), mean), config
        )[0]

    ours = {"vanilla": "grpo", "gspo": "gspo", "cispo": "cispo"}
    settings = [(n, a, 0) for n in names for a in ("token_mean", "response_mean")]
    settings = [s for s in settings if s[:2] != ("gspo", "token_mean")]
    return {
        (ours[n], a, dual, "", 0): loss(n, a, dual)
        for n, a, dual in [*settings, ("vanilla", "token_mean", 1.5)]
    }


def trl_losses(folder: pathlib.Path, x: dict[str, torch.Tensor]) -> dict:
    """As `verl_losses`; with TRL's importance weights, too, and its KL term."""
    path = folder / "trl/trainer/grpo_trainer.py"
    scope = {"nanmin": torch.min, "nanmax": torch.max, "math": math}
    compute = functions(path, "_compute_loss", torch=torch, **scope)._compute_loss
    one = Stub(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    types_of = {"token_mean": "dapo", "response_mean": "grpo", "constant": "dr_grpo"}
    mask = x["mask"].float()

    def weights(mode):
        diff = (x["old"] - x["sampled"]) * mask
        diff = diff.sum(-1, keepdim=True) if mode.startswith("sequence") else diff
        ratio = torch.exp(diff)
        return ratio.clamp(max=CAP) if "trunc" in mode else ratio * (ratio <= CAP)

    def loss(objective, aggregation, dual_clip, mode, kl_coef):
        cispo = objective == "cispo"
        trainer = Stub(
            model=Stub(training=True),
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="sequence" if objective == "gspo" else "token",
            beta=kl_coef,
            loss_type="cispo" if cispo else types_of[aggregation],
            epsilon_low=CLIP_LOW,
            epsilon_high=1 + CLIP_HIGH if cispo else CLIP_HIGH,
            args=Stub(delta=dual_clip or None, use_bias_correction_kl=False),
            use_vllm=bool(mode),
            vllm_importance_sampling_correction=bool(mode),
            current_gradient_accumulation_steps=1,
            max_completion_length=CONSTANT,
            accelerator=one,
            _entropy_bonus_enabled=False,
            aux_loss_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        inputs = {
            "prompt_ids": torch.zeros(8, 1).long(),
            "prompt_mask": torch.ones(8, 1),
            "completion_ids": torch.zeros(mask.shape).long(),
            "completion_mask": mask,
            "advantages": x["advantages"],
            "old_per_token_logps": x["old"],
            "ref_per_token_logps": x["ref"],
            "num_items_in_batch": mask.sum(),
            "importance_sampling_ratio": weights(mode) if mode else None,
        }

        def call(logps):
            policy = lambda *_, **__: (logps, torch.zeros_like(logps), None)
            trainer._get_per_token_logps_and_entropies = policy
            return compute(trainer, trainer.model, inputs)

        return call

    settings = [("grpo", a, 0, "", 0) for a in types_of]
    settings += [("grpo", a, 1.5, "", 0) for a in types_of]
    settings += [("grpo", a, 0, "", KL_COEF) for a in types_of]
    settings += [("grpo", "token_mean", 0, mode, 0) for mode in losses.IMPORTANCE]
    settings += [("gspo", "response_mean", dual, "", 0) for dual in (0, 1.5)]
    settings += [("cispo", "token_mean", 0, mode, 0) for mode in ("", "token_mask")]
    return {setting: loss(*setting) for setting in settings}


def ours(x: dict[str, np.ndarray], setting: tuple, no_lower_clip: bool):
    """Value and gradient of our loss."""
    objective, aggregation, dual_clip, mode, kl_coef = setting
    weights = losses.token_weights(
        x["mask"], aggregation=aggregation, constant=CONSTANT
    )
    importance = mode and losses.importance_weights(
        *(x["old"], x["sampled"], x["mask"]), mode=mode, cap=CAP
    )

    def loss(logps):
        return losses.grpo_loss(
            *(logps, x["old"], x["advantages"], weights),
            objective=objective,
            clip_low=1.0 if no_lower_clip else CLIP_LOW,
            clip_high=CLIP_HIGH,
            dual_clip=dual_clip,
            ref_logps=x["ref"],
            kl_coef=kl_coef,
            importance=importance if mode else None,
        )[0]

    return jax.value_and_grad(loss)(x["logps"])


def main(_):
    x = case()
    tensors = {name: torch.tensor(value) for name, value in x.items()}
    peers = {
        "TRL": trl_losses(pathlib.Path(_TRL.value), tensors),
        "verl": verl_losses(pathlib.Path(_VERL.value), tensors),
    }
    rows = []
    for peer, theirs in peers.items():
        for setting, loss in theirs.items():
            logps = tensors["logps"].clone().requires_grad_()
            value = loss(logps)
            value.backward()
            cispo = peer == "TRL" and setting[0] == "cispo"  # clips from above alone
            found, slope = ours(x, setting, no_lower_clip=cispo)
            gaps = abs(float(found) - value.item()), slope - logps.grad.numpy()
            cells = [*map(str, setting), f"{gaps[0]:.1e}", f"{abs(gaps[1]).max():.1e}"]
            rows.append(dict(zip(_COLUMNS, [peer, *cells], strict=True)))
    print(tables.Table("Largest differences", rows).markdown())


if __name__ == "__main__":
    app.run(main)
