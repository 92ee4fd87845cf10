"""The export suite: every width of weights with every width of activations, as a checked file.

All pairs start from one float network, are trained a little and written for one target. A pair is
done when its file was checked, or when quantizing was refused with a reason; anything else is a
failure, and tried again by the next call.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import tf_keras

import models
from qat import data as qat_data
from qat.benchmark import every_operator, export_table, pair
from qat.benchmark.checkpoint import make_float_model
from qat.benchmark.plan import Run, Terms
from qat.benchmark.store import Store
from qat.errors import UserError
from qat.export.containers import require_weight_storage
from qat.export.micro import require_tflite_micro
from qat.export.target import find_target
from qat.files import write_whole
from qat.float_model import load_float_model, require_model
from qat.machine import machine, versions
from qat.recipe import ACTIVATION_BITS, WEIGHT_BITS, load_recipe
from qat.report import to_json
from qat.verify import larq

SCHEMA_VERSION = 1
ALL_PAIRS = tuple(f"w{weights}a{bits}" for weights in WEIGHT_BITS for bits in ACTIVATION_BITS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """One call of the suite; see `qat-benchmark --help` for the meaning of each field."""

    terms: Terms
    output_dir: pathlib.Path
    recipes: tuple[str, ...] = ALL_PAIRS
    seed: int = 0
    epochs: int = 1
    target: str = "litert"
    weight_storage: str = "size"
    data_dir: str | None = None
    json: pathlib.Path | None = None
    command: str = ""

    @property
    def runs(self) -> list[Run]:
        """A run for each recipe."""
        common = {"seed": self.seed, "source": "qat", "epochs": self.epochs}
        return [Run(method=name, recipe=name, **common) for name in dict.fromkeys(self.recipes)]


def run(plan: ExportPlan) -> dict[str, Any]:
    """Does what is not done yet and no other process is doing; then writes table and JSON.

    Returns:
        What the JSON file holds.

    Raises:
        UserError: a mistake in the plan; or pairs that failed, once all else is written.
        DataError, RecipeError, ExportError: before any training.
    """
    return _Suite(plan).run()


class _Suite:
    def __init__(self, plan: ExportPlan):
        self.plan = plan
        if plan.terms.model != every_operator.NAME:
            require_model(plan.terms.model, f"; here also {every_operator.NAME}")
        if plan.json and not plan.json.absolute().parent.is_dir():
            raise UserError(f"--json={plan.json}: its folder does not exist")
        for recipe in plan.recipes:
            load_recipe(recipe)
        require_weight_storage(plan.weight_storage)
        if find_target(plan.target).arena:
            require_tflite_micro()
        if plan.target == "lce":
            larq.require_python()
        terms = plan.terms
        self.data = qat_data.load(
            terms.dataset, data_dir=plan.data_dir, batch_size=terms.batch_size, seed=plan.seed
        )
        self.store = Store(plan.output_dir, terms, f"export_{plan.target}_{plan.weight_storage}")

    def run(self) -> dict[str, Any]:
        self.store.make()
        seed, terms = self.plan.seed, self.plan.terms
        make_float_model(self.store, seed, terms, self.data, self.untrained, wait=True)
        elsewhere = [run for run in self.plan.runs if not self.store.finish(run, self.attempt)]
        if elsewhere:
            print(f"{len(elsewhere)} pairs are with other processes, e.g. {elsewhere[0].label}")
        content = self.write()
        self.require_success(content["pairs"])
        return content

    def untrained(self) -> tf_keras.Model:
        spec, name = self.data.spec, self.plan.terms.model
        if name == every_operator.NAME:
            return every_operator.build(spec.image_shape, spec.num_classes)
        return models.build(name, spec.image_shape, spec.num_classes)

    def attempt(self, run: Run) -> dict[str, Any]:
        """The result of a pair, or the error that ended it."""
        plan, start = self.plan, time.monotonic()
        result = dataclasses.asdict(run) | {"error": ""}
        tf_keras.backend.clear_session()
        tf_keras.utils.set_random_seed(run.seed)
        path = str(self.store.float_model(run.seed))
        job = pair.Job(
            recipe=run.recipe,
            epochs=run.epochs,
            float_model=load_float_model(path, self.data.spec, "--output_dir"),
            data=self.data,
            target=plan.target,
            weight_storage=plan.weight_storage,
            path=self.store.path(run).with_suffix(".tflite"),
        )
        try:
            found = pair.outcome(job)
            result |= dataclasses.asdict(found) | {"error": "; ".join(found.problems)}
        except Exception as error:  # whatever ends one pair is what the suite is there to find
            result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        result["seconds"] = round(time.monotonic() - start, 1)
        print(f"{run.label}: {export_table.verdict(result)}", flush=True)
        return result | {"machine": machine(), "versions": versions(), "command": plan.command}

    def write(self) -> dict[str, Any]:
        """Table and JSON of the plan's pairs, as far as they are in the folder."""
        plan, results = self.plan, {}
        for result in self.store.results():
            results[result["method"], result["seed"], result["epochs"]] = result
        keys = [(run.method, run.seed, run.epochs) for run in plan.runs]
        pairs = [results[key] for key in keys if key in results]
        content = {
            "schema_version": SCHEMA_VERSION,
            "suite": "export",
            **dataclasses.asdict(plan.terms),
            "seed": plan.seed,
            "epochs": plan.epochs,
            "target": plan.target,
            "weight_storage": plan.weight_storage,
            "command": plan.command,
            "pairs": pairs,
        }
        name = self.store.split
        write_whole(plan.json or plan.output_dir / f"{name}.json", to_json(content))
        text = export_table.markdown(pairs, about=self.about(pairs))
        write_whole(plan.output_dir / f"{name}.md", text.encode())
        print(text)
        return content

    def about(self, pairs: list[dict[str, Any]]) -> list[str]:
        plan, terms = self.plan, self.plan.terms
        packages = {tuple(result["versions"].items()) for result in pairs}
        return [
            f"target {plan.target}, weight storage {plan.weight_storage}; {terms.model} on "
            f"{self.data.spec.name}, seed {plan.seed}: {terms.float_epochs} epochs in float, then "
            f"{plan.epochs} a pair; {sum(result['seconds'] for result in pairs):.0f} s for "
            f"{len(pairs)} pairs",
            f"`{plan.command}`",
            *sorted({result["machine"] for result in pairs}),
            *("; ".join(f"{name} {version}" for name, version in found) for found in packages),
        ]

    def require_success(self, pairs: list[dict[str, Any]]) -> None:
        failed = [result for result in pairs if result["error"]]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.plan.runs)} pairs failed, e.g. "
                f"{failed[0]['method']}: {failed[0]['error']}; the same command tries them again"
            )
