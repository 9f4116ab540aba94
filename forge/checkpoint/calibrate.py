"""Norm calibration after assembly: the final norm rescaled in closed form, without a gradient.

Experts that never met are mixed, so the assembled model's logits can be too sharp or too flat. Its last RMSNorm is
followed by the LM head alone, so multiplying the norm's weight by s multiplies every logit by s: that is temperature
scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2) folded into a tensor that is there anyway. No layer's norm can
be used like that: it feeds the router too, and the shards are not ours to rewrite.

The loss is convex in s. With z the logits, p their softmax and y the target, its derivatives at s = 1 are

    L'(1) = E[ E_p[z] - z_y ],    L''(1) = E[ Var_p(z) ],

and s = 1 - L'(1) / L''(1) is the minimum of the parabola that they define (one Newton step). Both are collected on
every other window of the validation documents; the windows between decide whether the scale is kept.

Shapes: T tokens, N positions of a chunk, D d_model, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import safe_open
import torch
from torch import Tensor

from forge.checkpoint.assembly import arrived, calibration, record_calibration
from forge.checkpoint.safetensors_header import read_header
from forge.checkpoint.shard import tensor_bytes
from forge.data.packing import evaluation_windows
from forge.data.tokens import TokenFile
from forge.errors import storage_errors
from forge.files import atomic_file, hash_file
from forge.model.moe import MixtureLM
from forge.model.names import FINAL_NORM
from forge.train.memory import CHUNK_POSITIONS
from forge.vocabulary import CHUNK_BYTES, SHARED_FILE

#: A model that needs more than this is broken in another way than sharpness.
SMALLEST_SCALE, LARGEST_SCALE = 0.5, 2.0


@dataclass
class _Sums:
    """Sums over positions: of the loss at s = 1 and at the scale, and of the two derivatives at s = 1."""

    count: int = 0
    plain: float = 0.0
    scaled: float = 0.0
    slope: float = 0.0
    curvature: float = 0.0


def calibrate(
    model_dir: Path, validation_files: Sequence[Path], tokenizer_eos: int, seq_len: int, tokens: int
) -> dict[str, Any]:
    """Rescale the final norm of an assembled model, if that lowers its loss on held-out documents.

    `shared.safetensors` is replaced in one rename and the manifest says so after it. The result for the experts that
    are in place is remembered: asking again returns the first report and changes nothing.

    Args:
        model_dir: the assembled model.
        validation_files: token file of each partition's validation documents.
        tokenizer_eos: id of the end-of-text token.
        seq_len: tokens of a window.
        tokens: tokens to use of each partition, at most; half of them fit the scale, half judge it.

    Returns:
        `before` and `after`: nats a token on the judging half without and with the scale (None when there is no such
        text); `scale`; `kept`: whether the model was changed.

    Raises:
        StorageError: the model or a token file cannot be read, or the model directory cannot be written.
    """
    experts = {str(partition): sha256 for partition, sha256 in arrived(model_dir).items()}
    held = calibration(model_dir)
    if held is not None and held["experts"] == experts and held["sha256"] == hash_file(model_dir / SHARED_FILE):
        return {key: held[key] for key in ("before", "after", "scale", "kept")}
    model = MixtureLM.load(model_dir)
    windows = [window for path in validation_files
               for window in evaluation_windows(TokenFile(path), seq_len, tokenizer_eos, tokens)]  # fmt: skip
    fitting, judging = windows[0::2], windows[1::2]
    if not judging:
        return {"before": None, "after": None, "scale": 1.0, "kept": False}
    scale = _fit(model, fitting)
    weight_D = _stored_norm(model_dir)
    scaled_D = (weight_D.float() * scale).to(weight_D.dtype)
    # In bfloat16 the stored weights are not exactly `scale` times the old ones: judge what would be stored.
    ratio_D = torch.where(weight_D == 0, torch.ones(()), scaled_D.float() / weight_D.float())
    sums = _Sums()
    for window in judging:
        _measure(model, window, sums, ratio_D)
    del model  # Its memory is the file's, and Windows replaces no file that is in use.
    report = {"before": sums.plain / sums.count, "after": sums.scaled / sums.count, "scale": scale}
    report["kept"] = kept = report["after"] < report["before"]
    if kept:
        _replace_norm(model_dir / SHARED_FILE, scaled_D)
        record_calibration(model_dir, {**report, "experts": experts, "sha256": hash_file(model_dir / SHARED_FILE)})
    return report


def _fit(model: MixtureLM, windows: Sequence[npt.NDArray[Any]]) -> float:
    sums = _Sums()
    for window in windows:
        _measure(model, window, sums, None)
    if sums.curvature <= 0:
        return 1.0
    return min(max(1.0 - sums.slope / sums.curvature, SMALLEST_SCALE), LARGEST_SCALE)


@torch.inference_mode()
def _measure(model: MixtureLM, window: npt.NDArray[Any], sums: _Sums, ratio_D: Tensor | None) -> None:
    """Add one window: the derivatives when there is no ratio yet, else the loss without and with it."""
    tokens_T = torch.from_numpy(window)
    hidden_TD = model(tokens_T[None, :-1])[0]
    targets_T = tokens_T[1:]
    head_VD = model.head_weight.float()
    for begin in range(0, len(targets_T), CHUNK_POSITIONS):
        hidden_ND, target_N = (t[begin : begin + CHUNK_POSITIONS] for t in (hidden_TD, targets_T))
        z_NV = hidden_ND.float() @ head_VD.T
        zy_N = z_NV.gather(1, target_N[:, None])[:, 0]
        normaliser_N = z_NV.logsumexp(1)
        sums.count += len(target_N)
        sums.plain += float((normaliser_N - zy_N).double().sum())
        if ratio_D is None:
            p_NV = (z_NV - normaliser_N[:, None]).exp_()
            mean_N = (p_NV * z_NV).sum(1)
            sums.slope += float((mean_N - zy_N).double().sum())
            sums.curvature += float((p_NV * (z_NV - mean_N[:, None]).square()).sum(1).double().sum())
        else:
            z_NV = (hidden_ND.float() * ratio_D) @ head_VD.T
            sums.scaled += float((z_NV.logsumexp(1) - z_NV.gather(1, target_N[:, None])[:, 0]).double().sum())


def _stored_norm(model_dir: Path) -> Tensor:
    with safe_open(model_dir / SHARED_FILE, framework="pt") as file:
        weight_D: Tensor = file.get_tensor(FINAL_NORM)
    return weight_D


def _replace_norm(path: Path, weight_D: Tensor) -> None:
    """Copy the file with one tensor's bytes changed, in chunks, and put the copy in its place.

    The old file may be a hard link to the published blob, which must not change: so it is never written to.
    """
    header = read_header(path)
    begin = header.data_start + header.tensors[FINAL_NORM].begin
    data = bytes(tensor_bytes(weight_D))
    with storage_errors(path), atomic_file(path) as out, open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            out.write(chunk)
        out.seek(begin)
        out.write(data)
