import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from knockon.cli import main
from knockon.data import simulate
from knockon.forecast import Forecast

SOME = Forecast(
    preparation=60.0, steps=7000.0, validation=140.0, checkpoints=0.0, each=0.7, memory=2 * 10**9,
    free_memory=8 * 10**9, device_memory=0, free_device_memory=0, disk=10**6, free_disk=10**9,
)  # fmt: skip


def test_it_is_written_for_a_person() -> None:
    time, memory, disk = SOME.lines()
    assert time.startswith("time: 2 h (preparation 60 s, steps 117 min (0.7 s each), validation 2.33 min")
    assert memory == "memory: 2 GB at the peak, of 8 GB"
    assert disk == "disk: 1 MB of 1 GB"
    assert SOME.lacking == ()


def test_what_does_not_suffice_is_said_with_what_mends_it() -> None:
    tight = replace(SOME, free_memory=10**9, device_memory=20, free_device_memory=10, free_disk=10)
    memory, device, disk = tight.lacking
    assert "memory does not suffice (2 GB of 1 GB)" in memory
    assert "--train.cells" in memory
    assert "--device cpu" in device
    assert "--out" in disk
    assert len(list(tight.lines())) == 4


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model without steps, too, which is fitted."""
    simulate.simulate(simulate.tiny()).write_h5ad(tmp_path / "tiny.h5ad")
    out = tmp_path / "a" / "run"
    main(["train", "no_effect", "--data", f"{tmp_path}/tiny.h5ad", "--out", str(out), "--dry-run"])
    time, memory, disk = capsys.readouterr().out.splitlines()
    assert "steps 0 s" in time
    assert memory.startswith("memory: ")
    assert " kB of " in disk
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.h5ad"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["scdfm", "scldm"])
def test_memory_and_disk_are_foretold(model: str, tmp_path: Path) -> None:
    """Within 25 %, of a whole run in a process of its own; seconds are for `benchmarks.forecast`."""
    main(["simulate", f"{tmp_path}/tiny.h5ad", "--preset", "tiny"])
    code = f"""
import json, sys
from pathlib import Path
from dataclasses import fields, replace
from knockon import models
from knockon.data import splits
from knockon.data.screen import Screen
from knockon.forecast import forecast, peak_memory
from knockon.model import Training, Recipe
from knockon.train import train

def short(training):
    return replace(training, steps=24, validate_every=12, checkpoint_every=8, patience=0)

recipe = models.recipe("{model}", "small")
named = [f.name for f in fields(recipe.model) if isinstance(getattr(recipe.model, f.name), Training)]
stages = {{name: short(getattr(recipe.model, name)) for name in named}}
recipe = Recipe(model=replace(recipe.model, **stages), train=short(recipe.train))
screen = Screen.read("{tmp_path}/tiny.h5ad", layer="counts" if "{model}" == "scldm" else None)
split, out = splits.additive(screen), Path("{tmp_path}/run")
if sys.argv[1] == "forecast":
    found = forecast(recipe, screen, split, out=out)
    print(json.dumps([found.memory, found.disk]))
else:
    train(recipe, screen, split, out=out)
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    print(json.dumps([peak_memory(), sum(sizes) + max(sizes)]))
"""
    found = {}
    for what in ("forecast", "run"):
        command = [sys.executable, "-c", code, what]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    assert found["forecast"] == pytest.approx(found["run"], rel=0.25)
