"""The model card of a checkpoint, generated from its entry in the manifest."""

from huggingface_hub import EvalResult, ModelCardData

from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint

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
HUB_DATASETS = {"cifar100": "uoft-cs/cifar100", "imagenet-1k": "ILSVRC/imagenet-1k"}

TASKS = {"classification": "image-classification", "segmentation": "image-segmentation"}


def card(checkpoint: Checkpoint) -> str:
    """Return the model card: front matter as the Hub defines it, then the text."""
    dataset, steps = checkpoint.dataset, checkpoint.preprocessing
    size = "x".join(map(str, steps.input_size))
    segments = checkpoint.task == "segmentation"
    predicted, unit = ("label map", "pixel") if segments else ("top classes", "image")
    seeds, runs = ", ".join(map(str, checkpoint.seeds)), checkpoint.mean_and_sd()
    if runs:
        seeds += f" (top-1 {runs[0]:.2f} ± {runs[1]:.2f} over {len(checkpoint.runs)} seeds)"
    return f"""---
{front_matter(checkpoint).to_yaml()}
---
# {checkpoint.name}

{introduction(checkpoint)}

## Use

{use(checkpoint)}

## Results

{results(checkpoint)}

Measured on {dataset.images:,} images ({dataset.name}, {dataset.split}) by \
{checkpoint.reported.by}. Random seeds of the training runs: {seeds}; the results are those of the \
first. `predictions.npz` contains the {predicted} of each image. To recompute them, run \
`python eval/verify.py {checkpoint.name}`.

{guarantee(checkpoint)}## Training

```console
$ python train_scripts/{script(checkpoint)} {checkpoint.recipe} {checkpoint.name}
```

`recipe.yaml` contains the settings, `train_log.csv` the metrics of each epoch, and \
`environment.txt` versions and hardware.

## Intended use and limitations

The checkpoint is made for research into normalization, for comparison with other networks, and as \
a starting point for fine-tuning. It distinguishes the {dataset.num_classes} classes of \
{dataset.name} and assigns one of them to every {unit}. It has not been tested on other images, on \
adversarial images, or for bias. Do not base decisions about people on it.

- Parameters: {checkpoint.parameters:,}
- FLOPs for one image {size}: {checkpoint.flops:,} (a multiplication and an addition count as two)
- Preprocessing: {steps.interpolation} resize, {steps.crop_mode} crop {steps.crop_pct:g}, \
mean {list(steps.mean)}, std {list(steps.std)}
- File: {stored_file(checkpoint)}

## Licences

- Code: {checkpoint.licenses.code}
- Weights: {checkpoint.licenses.weights}
- Training data: {checkpoint.licenses.data}

```bibtex
{CITATION}
```
"""


def script(checkpoint: Checkpoint) -> str:
    """Return the name of the script that trains the checkpoint."""
    if checkpoint.task == "segmentation":
        return "train_segmentation.py"
    return "train_private.py" if checkpoint.privacy else "train.py"


def guarantee(checkpoint: Checkpoint) -> str:
    """Return the section on differential privacy, empty if the training was not private."""
    privacy = checkpoint.privacy
    if privacy is None:
        return ""
    facts = {
        "Guarantee": f"({privacy.epsilon:.4f}, {privacy.delta:g})-differential privacy",
        "Unit": privacy.unit,
        "Accountant": f"{privacy.accountant}; by Rényi differential privacy, epsilon is "
        f"{privacy.epsilon_rdp:.4f}",
        "Training images": f"{privacy.images:,}, a public constant",
        "Noise multiplier": f"{privacy.noise_multiplier:.6g}",
        "Clipping": f"each image's gradient to L2 norm {privacy.max_grad_norm:g}; the noisy sum is "
        f"divided by {privacy.normalizer:g}",
        "Sampling": f"{privacy.sampling}, rate {privacy.sample_rate:.6g}, {privacy.steps:,} steps",
        "Random generators": privacy.generator,
        "Released": privacy.released,
        "Earlier runs on the same images, not included in epsilon": str(privacy.earlier_runs),
        "Other data": privacy.public_data,
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"""## Differential privacy

{lines}

The training images are public, so the checkpoint demonstrates the method and protects nobody. \
`python eval/verify.py {checkpoint.name}` recomputes epsilon from these numbers. That the training \
used them cannot be verified from the file.

"""


def stored_file(checkpoint: Checkpoint) -> str:
    """Describe the weights file."""
    if file := checkpoint.file:
        return f"{file.bytes:,} bytes, {file.dtype}, SHA-256 `{file.sha256}`"
    return "none, only the predictions are stored"


def use(checkpoint: Checkpoint) -> str:
    """Explain how to load the checkpoint."""
    if not checkpoint.available:
        return "The weights are not stored. The recipe below trains them again."
    from_clone = checkpoint.source == "in the repository"
    classifies = checkpoint.task == "classification"
    registered = "`import kn_zoo` registers the network with timm. " if classifies else ""
    return f"""{"In a clone of kn_zoo" if from_clone else "With kn_zoo installed"}:

```python
{usage(checkpoint)}
```

{registered}The file is loaded only if its SHA-256 matches \
the manifest. With torch.hub, from a clone only the dependencies are needed:

```python
import torch

model = torch.hub.load(".", "{checkpoint.architecture}", source="local", pretrained=True, \
tag="{checkpoint.tag}")
```"""


def usage(checkpoint: Checkpoint) -> str:
    """Return Python code that loads the checkpoint, also from the Hub if it is there."""
    if checkpoint.task == "segmentation":
        create = f'kn_zoo.create_segmentation_model("{checkpoint.name}", pretrained=True)'
        return f"import kn_zoo\n\nmodel = {create}.eval()"
    hub = checkpoint.hub
    names = [checkpoint.name, *([f"hf-hub:{hub.repository}"] if hub else [])]
    lines = [f'model = timm.create_model("{name}", pretrained=True).eval()' for name in names]
    return "\n".join(["import timm, kn_zoo", "", *lines])


def introduction(checkpoint: Checkpoint) -> str:
    paper = f"[Kernel Normalized Convolutional Networks](https://arxiv.org/abs/{ARXIV})"
    data = checkpoint.dataset.name
    if checkpoint.norm == "kernel":
        return (
            f"A Kernel Normalized network of the model zoo `kn_zoo`, trained on {data}. It follows "
            f"{paper}: the mean and variance of each convolution window normalize that window. "
            "There are no batch statistics."
        )
    return (
        f"A baseline of the model zoo `kn_zoo` with {checkpoint.norm} normalization, trained on "
        f"{data}, for comparison with the networks of {paper}."
    )


def results(checkpoint: Checkpoint) -> str:
    """Return a Markdown table of the accuracy by inference statistics."""
    kernel, reported = checkpoint.norm == "kernel", checkpoint.reported.statistics
    columns = list(metrics(next(iter(reported.values()))))
    header = ["inference statistics" if kernel else "", *(f"{name} %" for name in columns)]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for statistics, accuracy in reported.items():
        draws = f" (mean of {accuracy.draws} draws)" if accuracy.draws > 1 else ""
        name = statistics if kernel else "as trained"
        values = ["" if v is None else f"{v:.2f}" for v in metrics(accuracy).values()]
        rows.append(f"| {' | '.join([name + draws, *values])} |")
    return "\n".join(rows)


def metrics(accuracy: Accuracy) -> dict[str, float | None]:
    """Return the percentages of an accuracy by the names that tables have for them."""
    if scores := accuracy.segmentation:
        return {
            "mIoU": scores.miou,
            "pixel accuracy": accuracy.top1,
            "class accuracy": scores.class_accuracy,
        }
    return {"top-1": accuracy.top1, "top-5": accuracy.top5}


def front_matter(checkpoint: Checkpoint) -> ModelCardData:
    """Return the metadata that the Hub reads: licence, library, tags, data set, results."""
    dataset, eval_results = checkpoint.dataset, []
    for statistics, accuracy in checkpoint.reported.statistics.items():
        suffix = "" if statistics == "expected" else f" ({statistics})"
        for metric, value in metrics(accuracy).items():
            if value is not None:
                label = metric.replace("top", "Top") + suffix
                eval_results.append(_eval_result(checkpoint, label, value))
    task = TASKS[checkpoint.task]
    norm = f"{checkpoint.norm}-normalization"
    return ModelCardData(
        license=checkpoint.licenses.weights.lower(),
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", norm, f"arxiv:{ARXIV}"],
        datasets=[HUB_DATASETS[dataset.name]] if dataset.name in HUB_DATASETS else None,
        metrics=["mean_iou"] if checkpoint.task == "segmentation" else ["accuracy"],
        model_name=checkpoint.name,
        eval_results=eval_results,
    )


def _eval_result(checkpoint: Checkpoint, metric: str, value: float) -> EvalResult:
    dataset = checkpoint.dataset
    return EvalResult(
        task_type=TASKS[checkpoint.task],
        dataset_type=HUB_DATASETS.get(dataset.name, dataset.name),
        dataset_name=dataset.name,
        dataset_split=dataset.split,
        metric_type="mean_iou" if metric.startswith("mIoU") else "accuracy",
        metric_name=metric,
        metric_value=value,
    )
