"""The training script on real images: recipe in, bundle out, and back after an interruption."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import kn_zoo  # noqa: F401
from kn_zoo import manifest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_scripts" / "train.py"
RECIPES = sorted((ROOT / "train_scripts" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate's settings are those of the process; each test has a run of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


CROP = {"augmentation": [{"RandomCrop": {"size": 8, "padding": 1}}]}
VARIANTS = {
    "plain": {},
    "on_device": {"on_device": True, **CROP},
    "bf16 ema": {"mixed_precision": "bf16", "ema_decay": 0.9, "ema_warmup": True},
    "compiled": {"compile": True, "on_device": True, **CROP},
}


@pytest.fixture(params=["plain"])
def recipe(tmp_path, request):
    settings = yaml.safe_load(
        (ROOT / "train_scripts/recipes/knpreactresnet20_cifar.digits.yaml").read_text()
    )
    settings |= {"epochs": 2, "batch_size": 128, "sampled_draws": 2}
    settings["scheduler"] |= {"warmup_epochs": 1}
    settings |= VARIANTS[request.param]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(script, *arguments):
    return script.cli.run(script.app, [str(a) for a in arguments])


@pytest.mark.parametrize("recipe", VARIANTS, indirect=True)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    script, recipe, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(script, recipe, "--output", whole) == 0

    save = script.save_checkpoint

    def save_and_stop(accelerator, folder, epoch):
        save(accelerator, folder, epoch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_stop)
        assert run(script, recipe, "--output", parts) == 130
    assert [p.name for p in parts.glob("epoch-*")] == ["epoch-0001"]
    assert run(script, recipe, "--output", parts) == 0

    models = [
        timm.create_model(f"local-dir:{folder / 'bundle'}", pretrained=True)
        for folder in (whole, parts)
    ]
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)
    logs = [(folder / "train_log.csv").read_text().splitlines() for folder in (whole, parts)]
    assert len(logs[0]) == 3
    without_seconds = [[line.rsplit(",", 1)[0] for line in log] for log in logs]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.parametrize("recipe", ["bf16 ema"], indirect=True)
def test_bf16_is_used_in_training_alone_and_the_average_is_what_is_stored(
    script, recipe, tmp_path, monkeypatch
):
    used = {True: set(), False: set()}
    create = script.create_model

    def watched(*args):
        model = create(*args)
        model.stem.register_forward_hook(
            lambda module, args, output: used[module.training].add(output.dtype)
        )
        return model

    monkeypatch.setattr(script, "create_model", watched)
    assert run(script, recipe, "--output", tmp_path / "run") == 0
    assert used == {True: {torch.bfloat16}, False: {torch.float32}}

    stored = timm.create_model(f"local-dir:{tmp_path / 'run' / 'bundle'}", pretrained=True)
    last = next((tmp_path / "run").glob("epoch-*"))
    averaged = torch.load(last / "custom_checkpoint_0.pkl")
    trained = load_file(last / "model.safetensors")
    for key, tensor in stored.state_dict().items():
        assert torch.equal(tensor, averaged[f"module.{key}"].half().float())
    assert any(not torch.equal(tensor, averaged[f"module.{k}"]) for k, tensor in trained.items())


def test_a_folder_of_another_recipe_is_left_alone(script, recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: another\n")
    assert run(script, recipe, "--output", folder) == 2
    assert (folder / "recipe.yaml").read_text() == "name: another\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: [", "not a recipe"),
        ("name: a.b\nlearning_rate: 1\n", "learning_rate"),
        ("- 1\n", "not a recipe"),
        (None, "not a recipe"),
    ],
)
def test_a_bad_recipe_is_one_line_and_status_2(tmp_path, text, reason):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, SCRIPT, path], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.glob("runs")) == []


def test_missing_images_are_status_2(script, tmp_path):
    recipe = ROOT / "train_scripts/recipes/knpreactresnet20_cifar.cifar100.yaml"
    assert run(script, recipe, "--output", tmp_path / "run", "--data-dir", tmp_path) == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole_and_those_of_the_bundles(script, path):
    recipe = script.Recipe.read(path)
    assert recipe.name == path.stem
    assert script.create_model(recipe, num_classes=3).num_classes == 3
    weight = manifest.load().get(recipe.name)
    if weight is not None and weight.bundle:
        stored = yaml.safe_load((weight.folder / "recipe.yaml").read_text())
        assert script.Recipe(**stored) == recipe
        assert weight.recipe == str(path.relative_to(ROOT))
