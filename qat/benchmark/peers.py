"""Peers that need an environment of their own: QKeras and Larq, trained by a script in a process.

They get the very batches that ours train on, augmented and in order, as arrays on disk.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qat import configs
from qat.benchmark.measure import packed_weight_bytes
from qat.benchmark.plan import ENVIRONMENT, FROM_CHECKPOINT, Run
from qat.benchmark.tfmot import PeerError
from qat.data import ImageData
from qat.errors import UserError
from qat.recipe import TERNARY

SCRIPT = pathlib.Path(__file__).with_name("peer_script.py")
IN_PROCESS = ("tfmot",)
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def require_environment(peers: tuple[str, ...], python: str | None) -> None:
    """Checks that a Python with these peers was named.

    Raises:
        UserError: with the command that makes such an environment.
    """
    for peer in peers:
        if peer in IN_PROCESS:
            continue
        if python is None or shutil.which(python) is None:
            what = "is not given" if python is None else f"{python} is no program"
            raise UserError(f"--peers={peer}: --peer_python {what}; make one: {ENVIRONMENT}")
        if subprocess.run([python, "-I", "-c", _FIND, peer], capture_output=True).returncode:
            raise UserError(f"--peer_python={python} has no {peer}; make one: {ENVIRONMENT}")


def run_peer(
    run: Run,
    python: str,
    float_model: tf_keras.Model,
    data: ImageData,
    images: tf.data.Dataset,
    *,
    learning_rate: float,
    log: pathlib.Path,
) -> dict[str, Any]:
    """Trains and measures one peer's network in a process of its own.

    Args:
        run: its source names the peer, its recipe the widths.
        python: of the peers' environment. float_model: the checkpoint, pixels in.
        data: to train on. images: batches (x, y) to measure on.
        log: a file for what the process writes.

    Returns:
        What `peer_script.py` returns.

    Raises:
        PeerError: the process failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory(dir=log.parent, prefix=".peer.") as name:
        folder = pathlib.Path(name)
        _write_job(folder, run, float_model, data.steps_per_epoch, learning_rate)
        stream = data.train_stream().take(run.epochs * data.steps_per_epoch)
        _write_batches(folder / "train", stream)
        _write_batches(folder / "measured", images)
        with log.open("wb") as output:
            code = subprocess.run(
                [python, "-I", SCRIPT, folder],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"TF_USE_LEGACY_KERAS": "1"},
            ).returncode
        if code:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise PeerError(f"{run.source} failed: {lines[-1][:200]}; all of it: {log}")
        return json.loads((folder / "result.json").read_text())


def _write_job(
    folder: pathlib.Path, run: Run, model: tf_keras.Model, steps_per_epoch: int, rate: float
) -> None:
    """job.json and weights.npz, as `peer_script.py` reads them."""
    job = {
        "peer": run.source,
        "widths": run.recipe.removeprefix("w").split("a"),
        "from_checkpoint": run.source != "larq" or run.method.endswith(FROM_CHECKPOINT),
        "seed": run.seed,
        "epochs": run.epochs,
        "steps_per_epoch": steps_per_epoch,
        "learning_rate": rate,
        "model": _for_older_keras(model),
    }
    (folder / "job.json").write_text(json.dumps(job))
    np.savez(folder / "weights.npz", *model.get_weights())


def _for_older_keras(model: tf_keras.Model) -> str:
    """The architecture as JSON that tf-keras 2.19 reads, which knows no optional inputs."""
    content = json.loads(model.to_json())
    for layer in content["config"]["layers"]:
        if layer["class_name"] == "InputLayer":
            layer["config"].pop("optional", None)
    return json.dumps(content)


def weight_bytes(run: Run, model: tf_keras.Model) -> int:
    """In theory, of QKeras's codes (8 bits at the edges) or Larq's (float at the edges)."""
    kernels = [layer for layer in model.layers if configs.kernels(layer)]
    bits = run.recipe[1 : run.recipe.index("a")]
    inner = 2 if bits == TERNARY else int(bits)
    edge = 32 if run.source == "larq" else 8
    return packed_weight_bytes(
        model, lambda layer: edge if layer in (kernels[0], kernels[-1]) else inner
    )


def _write_batches(folder: pathlib.Path, batches: tf.data.Dataset) -> None:
    """images.raw and labels.raw, uint8 (pixels are whole numbers) and int32, and their shapes."""
    folder.mkdir()
    sizes, shape = [], ()
    with (folder / "images.raw").open("wb") as images, (folder / "labels.raw").open("wb") as labels:
        for x, y in batches:
            images.write(np.rint(x.numpy()).astype(np.uint8).tobytes())
            labels.write(y.numpy().astype(np.int32).tobytes())
            sizes.append(len(x))
            shape = tuple(x.shape[1:])
    (folder / "shapes.json").write_text(json.dumps({"batch_sizes": sizes, "image_shape": shape}))
