"""The model card of a weight, generated from its entry in the manifest."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from kn_zoo.checkpoints.manifest import Checkpoint

ARXIV = "2205.10089"
PAPER = "https://openreview.net/forum?id=Uv3XVAEgG6"
CITATION = f"""@article{{nasirigerdeh2024kernelnorm,
  title={{Kernel Normalized Convolutional Networks}},
  author={{Nasirigerdeh, Reza and Torkzadehmahani, Reihaneh and
          Rueckert, Daniel and Kaissis, Georgios}},
  journal={{Transactions on Machine Learning Research}},
  year={{2024}},
  url={{{PAPER}}}
}}"""
ON_HUB = {"cifar100": "uoft-cs/cifar100", "imagenet-1k": "ILSVRC/imagenet-1k"}  # data sets there


def card(weight: Checkpoint) -> str:
    """The model card: front matter as the Hub defines it, then what a reader wants to know."""
    of, steps, file = weight.dataset, weight.preprocessing, weight.file
    size = "x".join(map(str, steps.input_size))
    stored = f"{file.bytes:,} bytes, {file.dtype}, SHA-256 `{file.sha256}`" if file else "none"
    seeds, runs = ", ".join(map(str, weight.seeds)), weight.mean_and_sd()
    if runs:
        seeds += f" (top-1 {runs[0]:.2f} ± {runs[1]:.2f} over {len(weight.runs)} seeds)"
    return f"""---
{front_matter(weight).to_yaml()}
---
# {weight.name}

{introduction(weight)}

## Use

```python
{usage(weight)}
```

`import kn_zoo` registers the network with timm and compares the file's SHA-256 with its manifest. \
From a checkout of kn_zoo, with nothing installed but the dependencies:

```python
import torch

model = torch.hub.load(".", "{weight.architecture}", source="local", pretrained=True, \
tag="{weight.tag}")
```

## Results

{results(weight)}

Measured on {of.images:,} images ({of.name}, {of.split}) by {weight.reported.by}; random seeds of \
the training runs: {seeds}, the stored file is that of the first. `predictions.npz` holds the top \
classes of each image; `python eval/verify.py {weight.name}` computes them again.

## Training

```console
$ python train_scripts/train.py {weight.recipe} {weight.name}
```

`recipe.yaml` holds the settings, `train_log.csv` the progress, `environment.txt` versions and \
hardware.

## Intended use and limits

Made for research into normalization and for comparison with other networks; a start for \
fine-tuning. It knows the {of.num_classes} classes of {of.name} and no others, always answers \
with one of them, and has not been tested on other images, on adversarial ones, or for bias: do \
not base decisions about people on it.

- Parameters: {weight.parameters:,}
- FLOPs of one image {size}: {weight.flops:,} (a multiplication and an addition are two)
- Preprocessing: {steps.interpolation} resize, {steps.crop_mode} crop {steps.crop_pct:g}, \
mean {list(steps.mean)}, std {list(steps.std)}
- File: {stored}

## Licences

- Code: {weight.licenses.code}
- Weights: {weight.licenses.weights}
- Data they were trained on: {weight.licenses.data}

```bibtex
{CITATION}
```
"""


def usage(weight: Checkpoint) -> str:
    """Python that loads the weight, from the Hub by its own name too if it is there."""
    names = [weight.name, *([f"hf-hub:{weight.hub.repository}"] if weight.hub else [])]
    lines = [f'model = timm.create_model("{name}", pretrained=True).eval()' for name in names]
    return "\n".join(["import timm, kn_zoo", "", *lines])


def introduction(weight: Checkpoint) -> str:
    paper = f"[Kernel Normalized Convolutional Networks](https://arxiv.org/abs/{ARXIV})"
    if weight.norm == "kernel":
        return (
            f"A Kernel Normalized network of the model zoo `kn_zoo`, trained on "
            f"{weight.dataset.name}. It follows {paper}: every convolution window is normalized by "
            "its own mean and variance, so there are no batch statistics."
        )
    return (
        f"A baseline of the model zoo `kn_zoo`, with {weight.norm} normalization, trained on "
        f"{weight.dataset.name}: what the networks of {paper} are compared with."
    )


def results(weight: Checkpoint) -> str:
    """Markdown table of the accuracy, under each of the inference statistics if it has them."""
    kernel = weight.norm == "kernel"
    head = "inference statistics" if kernel else ""
    rows = [f"| {head} | top-1 % | top-5 % |", "|---|---|---|"]
    for statistics, accuracy in weight.reported.statistics.items():
        top5 = "" if accuracy.top5 is None else f"{accuracy.top5:.2f}"
        draws = f" (mean of {accuracy.draws} draws)" if accuracy.draws > 1 else ""
        name = statistics if kernel else "as trained"
        rows.append(f"| {name}{draws} | {accuracy.top1:.2f} | {top5} |")
    return "\n".join(rows)


def front_matter(weight: Checkpoint) -> ModelCardData:
    """What the Hub reads of a card: licence, library, tags, data set, paper, results."""
    of, found = weight.dataset, []
    for statistics, accuracy in weight.reported.statistics.items():
        suffix = "" if statistics == "expected" else f" ({statistics})"
        for name, value in (("Top-1", accuracy.top1), ("Top-5", accuracy.top5)):
            if value is not None:
                found.append(_eval_result(weight, name + suffix, value))
    return ModelCardData(
        license=weight.licenses.weights.lower(),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", f"{weight.norm}-normalization", f"arxiv:{ARXIV}"],
        datasets=[ON_HUB[of.name]] if of.name in ON_HUB else None,
        metrics=["accuracy"],
        model_name=weight.name,
        eval_results=found,
    )


def _eval_result(weight: Checkpoint, metric: str, value: Any) -> EvalResult:
    of = weight.dataset
    return EvalResult(
        task_type="image-classification",
        dataset_type=ON_HUB.get(of.name, of.name),
        dataset_name=of.name,
        dataset_split=of.split,
        metric_type="accuracy",
        metric_name=metric,
        metric_value=value,
    )
