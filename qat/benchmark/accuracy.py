"""The accuracy suite: every recipe and every peer, from one float checkpoint a seed.

All runs of a seed start from the same float weights and see the same batches in the same order, for
the same number of epochs. Each is measured on its exported file where its widths export, else on
the Keras model, and says so. A finished run is kept at once: a benchmark that was cut off goes on,
and several processes with the same command share its runs out among themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tf_keras

import models
from qat import data as qat_data
from qat.apply import quantize_model
from qat.benchmark import networks, peers, plot, table
from qat.benchmark.candidate import Candidate
from qat.benchmark.checkpoint import make_float_model
from qat.benchmark.plan import Plan, Run, runs
from qat.benchmark.store import Store
from qat.benchmark.tfmot import PeerError
from qat.errors import UserError
from qat.figures import MISSING
from qat.files import write_whole
from qat.float_model import load_float_model, require_model
from qat.machine import machine, versions
from qat.report import to_json
from qat.train import TrainingError

SCHEMA_VERSION = 1


def run(plan: Plan) -> dict[str, Any]:
    """Does what is not done yet and no other process is doing; then writes table, plot and JSON.

    Returns:
        What the JSON file holds: "methods" are the table's rows, means of those in "runs".

    Raises:
        UserError: a mistake in the plan; or runs that failed, once all else is written.
        DataError, RecipeError, UnsupportedLayerError: before any training.
    """
    return _Benchmark(plan).run()


class _Benchmark:
    def __init__(self, plan: Plan):
        self.plan, self.runs = plan, runs(plan)
        require_model(plan.terms.model)
        if plan.json and not plan.json.absolute().parent.is_dir():
            raise UserError(f"--json={plan.json}: its folder does not exist")
        peers.require_environment(plan.peers, plan.peer_python)
        self.data = qat_data.load(
            plan.terms.dataset, data_dir=plan.data_dir, batch_size=plan.terms.batch_size
        )
        self.store = Store(plan.output_dir, plan.terms, plan.split)
        self.require_same_settings()

    def run(self) -> dict[str, Any]:
        seeds = dict.fromkeys(run.seed for run in self.runs)
        if not all(self.store.float_model(seed).exists() for seed in seeds):
            self.try_recipes()
        self.store.make()
        for seed in seeds:
            self.make_float_model(seed, wait=False)
        elsewhere = [run for run in self.runs if not self.store.finish(run, self.attempt)]
        if elsewhere:
            print(f"{len(elsewhere)} runs are with other processes, e.g. {elsewhere[0].label}")
        content = self.write()
        self.require_success()
        return content

    def try_recipes(self) -> None:
        """Raises what quantizing would raise: before minutes of float training."""
        for candidate in map(Candidate.parse, self.plan.recipes):
            quantize_model(self.untrained(), candidate.recipe, input_range=networks.PIXEL_RANGE)

    def require_same_settings(self) -> None:
        """Raises if finished runs of our recipes were trained otherwise than they would be today.

        A recipe's file, or the recommended settings of its name, may have changed since. Settings
        that are none are found here, too.
        """
        today = {one.text: one.trained_with() for one in map(Candidate.parse, self.plan.recipes)}
        for result in self.store.results():
            if result["error"] or result["source"] != "qat" or result["method"] not in today:
                continue
            then, now = result["settings"], today[result["method"]]
            other = [key for key in now if key not in then or then[key] != now[key]]
            if other:
                raise UserError(
                    f"--output_dir={self.plan.output_dir} has {result['method']} of seed "
                    f"{result['seed']}, trained with {other[0]} {then.get(other[0])}, now "
                    f"{now[other[0]]}: use another folder, or delete the results of "
                    f"{result['method']} there"
                )

    def untrained(self) -> tf_keras.Model:
        spec = self.data.spec
        return models.build(self.plan.terms.model, spec.image_shape, spec.num_classes)

    def data_of(self, seed: int) -> qat_data.ImageData:
        """The same examples in the seed's order."""
        return dataclasses.replace(self.data, seed=seed)

    # ------------------------------------------------------------ training

    def make_float_model(self, seed: int, *, wait: bool) -> None:
        data, terms = self.data_of(seed), self.plan.terms
        make_float_model(self.store, seed, terms, data, self.untrained, wait=wait)

    def attempt(self, run: Run) -> dict[str, Any]:
        """The result of a run, or the error that ended it."""
        result = dataclasses.asdict(run) | {"split": self.plan.split, "error": ""}
        self.make_float_model(run.seed, wait=True)
        print(run.label, flush=True)
        tf_keras.backend.clear_session()
        tf_keras.utils.set_random_seed(run.seed)
        path, terms = self.store.float_model(run.seed), self.plan.terms
        job = networks.Job(
            run=run,
            float_model=load_float_model(str(path), self.data.spec, "--output_dir"),
            data=self.data_of(run.seed),
            images=getattr(self.data, self.plan.split),
            learning_rate=terms.learning_rate_of(run.source),
            peer_python=self.plan.peer_python,
            path=self.store.path(run),
        )
        try:
            result |= dataclasses.asdict(networks.outcome(job))
            print(f"{run.label}: {result['accuracy']:.4f} on {result['measured_on']}", flush=True)
        except (TrainingError, PeerError) as error:
            result["error"] = " ".join(str(error).split())
            print(f"{run.label}: {result['error']}", flush=True)
        return result | {"machine": machine(), "versions": versions(), "command": self.plan.command}

    # ------------------------------------------------------------ writing

    def write(self) -> dict[str, Any]:
        """Table, plot and JSON of all runs in the folder that are of this split."""
        plan, results = self.plan, self.store.results()
        rows = table.methods(results)
        content = {
            "schema_version": SCHEMA_VERSION,
            "suite": "accuracy",
            **dataclasses.asdict(plan.terms),
            "split": plan.split,
            "command": plan.command,
            "methods": rows,
            "runs": results,
        }
        name = "accuracy" if plan.split == "test" else f"accuracy_{plan.split}"
        write_whole(plan.json or plan.output_dir / f"{name}.json", to_json(content))
        text = table.markdown(rows, about=self.about(results), failed=_errors(results))
        write_whole(plan.output_dir / f"{name}.md", text.encode())
        print(text)
        title = f"{plan.terms.model} on {self.data.spec.name}, {plan.split}"
        picture = plot.accuracy_png(rows, title)
        if picture is None:
            print(MISSING)
        else:
            write_whole(plan.output_dir / f"{name}.png", picture)
        return content

    def about(self, results: list[dict[str, Any]]) -> list[str]:
        terms, spec = self.plan.terms, self.data.spec
        count = spec.num_examples[self.plan.split]
        machines = sorted({result["machine"] for result in results})
        packages = {tuple(result["versions"].items()) for result in results}
        return [
            f"{terms.model} on {spec.name}, {self.plan.split} ({count:,} images); float "
            f"checkpoint: {terms.float_epochs} epochs, batches of {terms.batch_size}",
            f"`{self.plan.command}`",
            *machines,
            *("; ".join(f"{name} {version}" for name, version in found) for found in packages),
        ]

    def require_success(self) -> None:
        failed = [
            result
            for result in self.store.results()
            if result["error"] and any(_is_of(result, run) for run in self.runs)
        ]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.runs)} runs failed, e.g. {_errors(failed)[0]}; the "
                "same command tries them again"
            )


def _errors(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"seed {result['seed']}, {result['method']}, {result['epochs']} epochs: {result['error']}"
        for result in results
        if result["error"]
    ]


def _is_of(result: dict[str, Any], run: Run) -> bool:
    return all(result[key] == value for key, value in dataclasses.asdict(run).items())
