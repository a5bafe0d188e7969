"""The command line: each verb reads its arguments, calls what does the work, and prints what came out.

Whatever is heavy is imported inside the verbs, so that `--help` answers at once.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskfirst.errors import UserError, listed, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

    from maskfirst.build import Experiment
    from maskfirst.contracts import Dataset, Proposer
    from maskfirst.cost import Cost
    from maskfirst.data.check import Report
    from maskfirst.evaluate import Evaluation
    from maskfirst.metrics.seen import Split as SeenSplit
    from maskfirst.segmenter import Segmenter
    from maskfirst.shards.run import Crew
    from maskfirst.shards.worker import Job
    from maskfirst.types import Vocabulary

DEFAULT = "camvid-small"
"""The bundled weights that `predict` takes when it is given pictures alone."""

app = typer.Typer(
    help="Image segmentation with vision transformers. Masks first, names second.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(StrEnum):
    """The numbers that a network computes with."""

    fp32 = "fp32"
    bf16 = "bf16"


class Split(StrEnum):
    """A part of a data set."""

    train = "train"
    val = "val"
    test = "test"


class Shards(StrEnum):
    """What files of the segments of many pictures are."""

    parquet = "parquet"
    coco = "coco"


class Task(StrEnum):
    """What a picture is turned into."""

    semantic = "semantic"
    instance = "instance"
    panoptic = "panoptic"


class Engine(StrEnum):
    """What runs a network."""

    torch = "torch"
    onnx = "onnx"


class Numbers(StrEnum):
    """What the weights of a graph are kept in."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class Values(StrEnum):
    """What label maps hold: indices of classes, or the vocabulary's own numbers for them."""

    by_index = "index"
    by_id = "ids"


class Log(StrEnum):
    """A place for the numbers of a training, besides the run folder's own log."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


class Oracle(StrEnum):
    """A part that is told the truth."""

    oracle = "oracle"


Weights = Annotated[str, typer.Argument(help="A .safetensors file, a run folder, hub:org/name or a bundled name.")]
Model = Annotated[
    str, typer.Argument(metavar="WEIGHTS", help="As for the other verbs, or an .onnx file that `export` has written.")
]
RunBy = Annotated[
    Engine | None,
    typer.Option(
        help="What runs the network: onnx (onnxruntime) for .onnx files, which is the default there, or torch."
    ),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Devices = Annotated[int, typer.Option(min=1, help="Processes on this machine: GPUs, where there are any.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import classes of your own that the weights name, package.module:Class.")
]
Boundary = Annotated[bool, typer.Option("--boundary", help="Score label maps along borders, too: boundary IoU.")]
Unseen = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|LIST",
        help="A class that training had no labels of; repeatable. Or a bundled list of them, or a text file with one a "
        "line. Seen and unseen classes are then scored apart, too.",
    ),
]
OnlyUnseen = Annotated[
    bool,
    typer.Option(
        "--only-unseen", help="Score unseen classes alone, as if there were no others, on pictures that show some."
    ),
]
AsPublished = Annotated[
    bool,
    typer.Option(
        "--as-published",
        help="Take means over seen and unseen classes as the published evaluators do, classes that do not occur included.",
    ),
]
Masks = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Name these masks, of whatever tool: COCO instance or panoptic JSON, a folder of .npz or PNG. "
        "The weights need a namer of points. What the file calls them counts with --blend.",
    ),
]
Blend = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="0..1",
        help="The share of the names by points, the rest being those that the masks had before: 0.4 by default with "
        "--namer, 1 with --masks.",
    ),
]
Tta = Annotated[bool, typer.Option("--tta", help="Average over the scales and flips of the recipe's `inference`.")]


@app.command()
def train(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="A recipe file, or the name of a bundled recipe. Several are stages: they train one after another, and "
            "those that have ended are passed over with --resume.",
        ),
    ],
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/RECIPE by default.")] = None,
    start_from: Annotated[str | None, typer.Option("--from", help="Weights of which all that fits is loaded.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Pictures at once in a process, auto for what fits; those of a step stay the recipe's.",
        ),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="In place of the recipe's.")] = None,
    devices: Devices = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    log: Annotated[list[Log] | None, typer.Option(help="Where else numbers go; tensorboard by default.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model. The run folder gets the best and the last weights, scores, curves and pictures."""
    from maskfirst.loggers import LOGGERS
    from maskfirst.train import train

    stages = len(recipes) > 1
    for wanted, option in ((out, "--out"), (start_from, "--from"), (devices > 1 or nodes > 1, "more than one process")):
        if stages and wanted:
            raise UserError(f"{option} is for one recipe, and these are {len(recipes)}; train one at a time")
    told = [*(changes or []), *([] if batch is None else [f"train.micro={_micro(batch)}"])]
    # All are read before the first one trains, which may take days.
    experiments = [_experiment(recipe, told) for recipe in recipes]
    results = []
    for experiment in experiments:
        folder = out or Path("runs") / experiment.recipe.name
        result = train(
            experiment,
            folder,
            resume=resume and (folder.exists() or not stages),
            devices=devices,
            nodes=nodes,
            precision=None if precision is None else precision.value,
            start_from=start_from,
            loggers=[LOGGERS[place] for place in log or [Log.tensorboard]],
        )
        results.append({"out": str(folder), "steps": result.steps, "best": result.best, "scores": result.scores})
        if _chief() and not as_json:
            print(f"best score {result.best:.2%}; weights, curves and pictures are in {folder}")
    if _chief() and as_json:
        _print_json(results if stages else results[0])


@app.command()
def evaluate(
    weights: Model,
    data: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Take the data of this recipe, not of the weights'.")
    ] = None,
    changes: Changes = None,
    split: Annotated[Split, typer.Option(help="The part of the data.")] = Split.val,
    task: Annotated[Task | None, typer.Option(help="In place of the recipe's.")] = None,
    boundary: Boundary = False,
    unseen: Unseen = None,
    only_unseen: OnlyUnseen = False,
    as_published: AsPublished = False,
    tta: Tta = False,
    trust: Trust = False,
    masks: Masks = None,
    proposer: Annotated[Oracle | None, typer.Option(help="Take the true masks: measures the names alone.")] = None,
    namer: Annotated[
        str | None,
        typer.Option(
            metavar="oracle|WEIGHTS",
            help="Take the true names: measures the masks alone. Or blend in names by the points of these weights.",
        ),
    ] = None,
    blend: Blend = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Score all masks at hand under all names at hand, the true ones with them.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for scores.json and pictures of the ten worst.")] = None,
    devices: Devices = 1,
    precision: Annotated[Precision, typer.Option(help="Of the network.")] = Precision.fp32,
    engine: RunBy = None,
    as_json: Json = False,
) -> None:
    """Score a model against the truth of a data set, class by class."""
    from maskfirst import ranks
    from maskfirst.compose import among, with_true_names
    from maskfirst.compose import matrix as compose_matrix
    from maskfirst.data.zero_shot import WithUnseen
    from maskfirst.evaluate import evaluate
    from maskfirst.files import write_json
    from maskfirst.weights import require_same_vocabulary

    segmenter = _loaded(weights, engine, "cpu", trust)
    experiment = _of_weights(weights, changes, trust) if data is None else _experiment(data, changes)
    dataset = experiment.dataset(split.value)
    require_same_vocabulary(segmenter.vocabulary, dataset.vocabulary, f"{experiment.recipe.source}: data.{split}")
    if matrix and (proposer is not None or namer == Oracle.oracle):
        raise UserError("--matrix has the oracles already; leave --proposer oracle and --namer oracle out")
    names = None if namer in (None, Oracle.oracle) else namer
    saved = None if masks is None else _saved(masks, segmenter, blend is not None)
    segmenter = _composed(segmenter, None if matrix else saved, proposer is not None, names, blend, trust)
    if namer == Oracle.oracle:
        segmenter = with_true_names(segmenter)
    asked = task.value if task else experiment.task
    told_apart = _split(unseen, experiment.unseen, only_unseen, as_published)
    if told_apart is not None and only_unseen:
        dataset = WithUnseen(dataset, sorted(told_apart.unseen))
    with ranks.processes(devices, 1, precision.value) as fabric:
        chief = fabric.global_rank == 0
        # Each once, however many models are scored.
        failed: dict[str, None] = {}

        def scored(model: "Segmenter", worst: Path | None = None) -> "Evaluation":
            if told_apart is not None and only_unseen:
                model = among(model, sorted(told_apart.unseen))
            with _bar("evaluating", chief) as advance, fabric.autocast():
                told = evaluate(
                    model.to(fabric.device),
                    dataset,
                    asked,
                    augment=tta,
                    rank=fabric.global_rank,
                    world=fabric.world_size,
                    gather=ranks.gather,
                    progress=advance,
                    worst_dir=worst,
                    boundary=boundary,
                    split=told_apart,
                )
            failed.update(dict.fromkeys(error for _, error in told.failed))
            return told

        if matrix:
            found = compose_matrix(segmenter, lambda model: scored(model).scores, blend, saved)
        else:
            found = scored(segmenter, None if out is None else out / "worst")
    if not chief:
        return
    if out is not None:
        write_json(out / ("matrix.json" if matrix else "scores.json"), found.as_json())
    if as_json:
        _print_json(found.as_json())
    else:
        _print(found.as_table())
    _end([*failed])


@app.command()
def score(
    truth: Annotated[
        Path,
        typer.Argument(help="A folder of label maps, a JSON file in one of COCO's formats, or Cityscapes' gtFine."),
    ],
    prediction: Annotated[Path, typer.Argument(help="The same of predictions; for instances a list of results, too.")],
    task: Annotated[Task, typer.Option(help="What was predicted.")],
    vocabulary: Annotated[
        str | None, typer.Option(help="The names of the classes, bundled or a file; the truth's own by default.")
    ] = None,
    ignore: Annotated[
        int | None,
        typer.Option(
            help="No class, in label maps. 255 by default, 65535 with more than 254 classes.", min=0, max=65535
        ),
    ] = None,
    truth_values: Annotated[
        Values | None, typer.Option(help="What label maps of the truth hold, where they do not show it.")
    ] = None,
    prediction_values: Annotated[
        Values | None, typer.Option(help="The same of the predictions; index, where they do not show it.")
    ] = None,
    boundary: Boundary = False,
    unseen: Unseen = None,
    only_unseen: OnlyUnseen = False,
    as_published: AsPublished = False,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the scores.")] = None,
    as_json: Json = False,
) -> None:
    """Score saved predictions against saved truth, class by class, as the reference evaluators do."""
    from maskfirst.data.vocabulary import load
    from maskfirst.files import write_json
    from maskfirst.score import score

    with _bar("scoring", True) as advance:
        result = score(
            truth,
            prediction,
            task.value,
            None if vocabulary is None else load(vocabulary),
            ignore=ignore,
            truth_values=None if truth_values is None else truth_values.value,
            prediction_values=None if prediction_values is None else prediction_values.value,
            boundary=boundary,
            split=_split(unseen, (), only_unseen, as_published),
            progress=advance,
        )
    for warning in result.warnings:
        print(f"maskfirst: warning: {warning}", file=sys.stderr)
    if out is not None:
        write_json(out, result.as_json())
    if as_json:
        _print_json(result.as_json())
    else:
        _print(result.found.as_table())


@app.command()
def vectors(
    names: Annotated[str, typer.Argument(help="A vocabulary, bundled or a file; or a text file with one name a line.")],
    encoder: Annotated[
        str,
        typer.Option(
            metavar="LIBRARY:MODEL",
            help="The text encoder: open_clip:ViT-B-16/openai, transformers:openai/clip-vit-base-patch16, a folder, ...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="A .safetensors file; names that it has already are not encoded again.")],
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A sentence with {} for the name; repeatable. Eight of CLIP's by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make class vectors of names with a text encoder, for the namers that can name what training never showed."""
    from maskfirst.data.vocabulary import load
    from maskfirst.text_vectors import TEMPLATES, cached

    wrong = [each for each in template or [] if "{}" not in each]
    if wrong:
        raise UserError(f"--template '{wrong[0]}': should have {{}} where the name goes")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: should end in .safetensors")
    found, made = cached(out, load(names).names, encoder, template or TEMPLATES)
    if as_json:
        _print_json({"out": str(out), "names": len(found.names), "made": made, "length": found.vectors.shape[1]})
    else:
        print(f"{len(found.names)} vectors of {found.vectors.shape[1]} numbers in {out}, {made} of them new")


@app.command()
def predict(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[WEIGHTS] PATH...",
            help=f"Weights ({DEFAULT} if none are named); files, folders, globs, videos, camera:0.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for what is made, overlays and summary.json.")],
    weights: Annotated[str | None, typer.Option(help="The weights, if not the first argument.")] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="What to make of the pictures: label maps (semantic), COCO's panoptic or instance files. "
            "By default what the model was made for."
        ),
    ] = None,
    yolo: Annotated[bool, typer.Option("--yolo", help="Write instances as YOLO's polygons, too.")] = False,
    least_score: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Of instances in overlays, the summary and YOLO's files; COCO's has all. 0.5 by default, with --masks 0.",
        ),
    ] = None,
    masks: Masks = None,
    namer: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="Blend in names by the points of these weights.")
    ] = None,
    blend: Blend = None,
    points: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Name these places and no masks: a table of image, y, x in px. Needs a namer of points."
        ),
    ] = None,
    tta: Tta = False,
    trust: Trust = False,
    overlays: Annotated[bool, typer.Option(help="Paint the segments over the pictures, too.")] = True,
    opacity: Annotated[
        float, typer.Option(min=0, max=1, help="Of the paint: its share of a pixel, the rest being the picture.")
    ] = 0.5,
    colors: Annotated[
        str | None, typer.Option(metavar="VOCABULARY", help="Take the colours of this one, such as ade20k, or a file.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier run has finished.")] = False,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="The first so many of each video; of a camera, which else ends with Ctrl-C."),
    ] = None,
    shards: Annotated[
        Shards | None,
        typer.Option(
            help="For pictures without number, also in tar and Parquet files: nothing but a file of segments for each so many, "
            "each written once, however often this is ended and begun again."
        ),
    ] = None,
    per_shard: Annotated[int | None, typer.Option(min=1, help="Pictures of a shard; 1000 by default.")] = None,
    column: Annotated[str | None, typer.Option(help="Of pictures, in Parquet files with several.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="That make shards, here or on --ray's cluster; on a cluster as many as it has room for."
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Make shards on a Ray cluster; 'local' starts one here.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the network.")] = Precision.fp32,
    engine: RunBy = None,
    as_json: Json = False,
) -> None:
    """Segment pictures: label maps or COCO's files, overlays with a legend, and the share of every class."""
    import torch

    from maskfirst.draw import SURE
    from maskfirst.predict import predict_files
    from maskfirst.predict_points import predict_points

    if points is not None:
        _refuse("--points names places, and {} is about masks; give one of them", masks=masks, namer=namer)
    if shards is None:
        told = {"per_shard": per_shard, "column": column, "processes": processes, "ray": ray}
        _refuse("{} is of shards; say --shards parquet, too, or leave it out", **told)
    chosen, paths = _weights_and_paths(arguments, weights)
    if shards is not None:
        told = {
            "masks": masks,
            "namer": namer,
            "points": points,
            "colors": colors,
            "least_score": least_score,
            "frames": frames,
        }
        _refuse("--shards writes all segments and nothing else; leave {} out", **told, yolo=yolo or None)
        from maskfirst.shards.run import SIZE, Crew, job_of

        wanted = task.value if task else None
        job = job_of(chosen, out, wanted, shards.value, per_shard or SIZE, tta, trust, column, precision.value)
        _predict_shards(job, paths, Crew(processes, ray), as_json)
        return
    # Not by way of Fabric as the other verbs, whose import would double the wait for the first picture.
    device = _device()
    segmenter = _loaded(chosen, engine, device, trust)
    saved = None if masks is None else _saved(masks, segmenter, blend is not None)
    segmenter = _composed(segmenter, saved, False, namer, blend, trust).to(device)
    painted = None if colors is None else _colors(segmenter.vocabulary, colors)
    low = torch.autocast(device, torch.bfloat16, enabled=precision is Precision.bf16)
    if points is not None:
        with _bar("naming", True) as advance, low:
            summary = predict_points(segmenter, paths, points, out, overlays, progress=advance)
        if as_json:
            _print_json(summary.as_json())
        else:
            count = sum(each["points"] for each in summary.images)
            print(f"{count} points in {len(summary.images)} pictures named with {chosen}; see {out / 'points.csv'}")
        _end([each["error"] for each in summary.failed])
        return
    with _bar("predicting", True) as advance, low:
        summary = predict_files(
            segmenter,
            paths,
            out,
            task.value if task else segmenter.default_task,
            overlays=overlays,
            opacity=opacity,
            colors=painted,
            resume=resume,
            augment=tta,
            progress=advance,
            least_score=(SURE if masks is None else 0.0) if least_score is None else least_score,
            yolo=yolo,
            frames=frames,
        )
    if as_json:
        _print_json(summary.as_json())
    else:
        print(f"{len(summary.images)} pictures segmented with {chosen}; see {out / 'overlays' if overlays else out}")
    _end([each["error"] for each in summary.failed])


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="RECIPE|WEIGHTS", help="A recipe, or weights.")],
    changes: Changes = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Of the picture, px; the recipe's size by default, or 512x512."),
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Print a recipe as it is resolved, and what its model costs: parameters, multiply-adds, memory to train."""
    import yaml

    from maskfirst.cost import cost

    experiment = _of_weights(what, changes, trust) if _names_weights(what) else _experiment(what, changes)
    segmenter = experiment.segmenter(meta=True)
    seen = (experiment.size or (512, 512)) if size is None else _size(size)
    found = cost(segmenter, seen)
    if as_json:
        _print_json({"recipe": experiment.recipe.tree, "cost": _cost_as_json(found)})
        return
    print(yaml.safe_dump(experiment.recipe.tree, sort_keys=False, allow_unicode=True, default_flow_style=None))
    _print(_cost_as_table(found))


@app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, or a data folder.")],
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and a contact sheet.")] = None,
    as_json: Json = False,
) -> None:
    """Look for all that is wrong with a recipe and its data. Reads every picture once; exits with 1 if there is something."""
    from maskfirst.data.check import check
    from maskfirst.files import write_json

    datasets, unseen = _datasets(what, changes)
    with _bar("checking", True) as advance:
        report = check(datasets, None if out is None else out / "sheet.png", advance, unseen=unseen)
    if out is not None:
        write_json(out / "report.json", report.as_json())
    if as_json:
        _print_json(report.as_json())
    else:
        _print_report(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of one of the original projects, or a zip archive with one in it.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    names: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint of ViT-P that names the masks of the first, too: one model of both."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The recipe of its model; the bundled one that fits by default.")
    ] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Make weights of ours from a checkpoint of the original projects, or from two; every key is spoken for."""
    from maskfirst.convert.catalogue import convert

    if recipe is None and changes:
        raise UserError("convert: --set changes a recipe; give one with --recipe")
    report = convert(checkpoint, None if recipe is None else _experiment(recipe, changes).recipe, out, names)
    if as_json:
        _print_json(report.as_json())
    else:
        print(report)


@app.command()
def export(
    weights: Weights,
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for torch.export.")],
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Pictures to compare on, files, folders and globs; repeatable. By default the data's."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Take the data of this recipe, not of the weights'.")
    ] = None,
    changes: Changes = None,
    split: Annotated[Split, typer.Option(help="The part of the data.")] = Split.val,
    task: Annotated[Task | None, typer.Option(help="To compare and to score; the recipe's by default.")] = None,
    answer: Annotated[
        Task | None, typer.Option(help="Let the graph give the answer to this task, too, beside masks and names.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH", help="The only canvas that the graph takes, px; any, where the network can."
        ),
    ] = None,
    numbers: Annotated[
        Numbers, typer.Option(help="What weights become; the score lost on the data by fp16 and int8 is told.")
    ] = Numbers.fp32,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX or a torch.export program, compared with PyTorch on pictures, and refused where they differ."""
    from maskfirst import build
    from maskfirst.export import export, pictures_of_data, pictures_of_files
    from maskfirst.predict import find_pictures
    from maskfirst.weights import require_same_vocabulary

    segmenter = build.load(weights, trusted=trust)
    own = _of_weights(weights, None, trust)
    dataset = None
    if images is None or numbers is not Numbers.fp32 or segmenter.uses_truth:
        experiment = _of_weights(weights, changes, trust) if data is None else _experiment(data, changes)
        dataset = experiment.dataset(split.value)
        require_same_vocabulary(segmenter.vocabulary, dataset.vocabulary, f"{experiment.recipe.source}: data.{split}")
    if images is not None and not segmenter.uses_truth:
        pictures = pictures_of_files(find_pictures(images))
    else:
        assert dataset is not None
        pictures = pictures_of_data(dataset, segmenter.uses_truth)
    found = export(
        segmenter,
        own.recipe,
        out,
        pictures,
        task.value if task else segmenter.default_task,
        size=None if size is None else _size(size),
        answer=None if answer is None else answer.value,
        numbers=numbers.value,
        dataset=dataset,
    )
    if as_json:
        _print_json(found.as_json())
    else:
        _print(found.as_table())
        print(f"written: {', '.join(map(str, found.files))}")


@app.command()
def serve(
    weights: Annotated[str, typer.Argument(metavar="[WEIGHTS]", help="As for predict, or an .onnx file.")] = DEFAULT,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures that go through the model together at most.", show_default=False)
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Accepted at a time; others are told to try again.")] = 32,
    megabytes: Annotated[float, typer.Option(min=0.001, help="Of a picture's file.")] = 20,
    megapixels: Annotated[float, typer.Option(min=0.001, help="Of a picture.")] = 25,
    seconds: Annotated[float, typer.Option(min=0.1, help="For a request, from its first byte to its answer.")] = 60,
    trust: Trust = False,
) -> None:
    """Answer pictures over HTTP, with a page for people at the same address. A key in MASKFIRST_API_KEY is asked for."""
    import logging

    try:
        from maskfirst.serve import Limits, application, run
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'maskfirst[serve]'") from error

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, stream=sys.stderr)
    limits = Limits(
        bytes=round(1e6 * megabytes), pixels=round(1e6 * megapixels), seconds=seconds, requests=requests, batch=batch
    )
    segmenter = _loaded(weights, None, _device(), trust)
    key = os.environ.get("MASKFIRST_API_KEY")
    if key == "":
        raise UserError("MASKFIRST_API_KEY is empty; set a key, or unset it to ask for none")
    name = Path(weights).name.removesuffix(".safetensors")
    run(application(segmenter, name, limits, key), host, port, limits, lambda address: print(address, flush=True))


@app.command()
def publish(
    weights: Weights,
    destination: Annotated[str, typer.Argument(help="A folder, or hub:org/name.")],
    half: Annotated[bool, typer.Option("--half", help="Numbers of 16 bits: half the size.")] = False,
    licence: Annotated[
        str | None, typer.Option(metavar="NAME", help="For the card: the licence's identifier, such as apache-2.0.")
    ] = None,
) -> None:
    """Write a model for others: one file of weights, and a card with its names, its scores and its recipe."""
    from maskfirst.publishing import publish

    print(f"written: {publish(weights, destination, half=half, licence=licence)}")


@app.command()
def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]...", help="Those whose names have all of these in them.")
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Count parameters and multiply-adds: a second a recipe, or some.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the bundled recipes: what the originals have published, and ours beside."""
    from dataclasses import asdict

    from rich.table import Table

    from maskfirst import recipe
    from maskfirst.cost import counted, row

    rows = [row(name) for name in recipe.names() if all(word in name for word in words or ())]
    if not rows:
        raise UserError(f"no recipe's name has {listed(words or ())} in it; there are {len(recipe.names())}")
    counts = []
    with _bar("counting", count) as advance:
        for each in rows if count else ():
            counts.append(counted(each.name))
            advance(len(counts), len(rows))
    if as_json:
        told = [asdict(each) for each in counts] if count else [{} for _ in rows]
        _print_json([asdict(each) | more for each, more in zip(rows, told, strict=True)])
        return
    table = Table(caption="scores, of mIoU with test-time augmentation after the slash; parameters; multiply-adds")
    table.add_column("recipe", no_wrap=True)
    table.add_column("data")
    for column in ("scores", "ours", "M", "G"):
        table.add_column(column, justify="right")
    for _ in range(2 * count):
        table.add_column("ours", justify="right")
    table.add_column("checkpoint")
    for index, each in enumerate(rows):
        published, own = each.published, each.measured
        ours = counts[index] if count else None
        table.add_row(
            each.name,
            next((figures.dataset for figures in (published, own) if figures), ""),
            _scores(published.scores) if published else "",
            _scores(own.scores) if own else "",
            f"{published.parameters / 1e6:.1f}" if published and published.parameters else "",
            f"{published.gflops:.1f}" if published and published.gflops else "",
            *([f"{ours.parameters / 1e6:.1f}", f"{ours.gflops:.1f}" if ours.gflops else ""] if ours else []),
            _checkpoint(published.checkpoint) if published else "",
        )
    _print(table)


def _checkpoint(files: str | tuple[str, str] | None) -> str:
    return files or "" if not isinstance(files, tuple) else " + ".join(files)


def _scores(scores: Mapping[str, float]) -> str:
    """Such as "54.6 / 55.2" for mIoU, plain and augmented, or "PQ 57.8 / AP 48.6 / mIoU 67.4"."""
    if scores.keys() <= {"mIoU", "mIoU_tta"}:
        return " / ".join(f"{score:.1f}" for score in scores.values())
    return " / ".join(f"{name} {score:.1f}" for name, score in scores.items())


@app.command()
def shapes(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    count: Annotated[int, typer.Option(min=2, help="Pictures, a quarter of them for validation.")] = 12,
) -> None:
    """Write a small made-up data set: pictures, label maps, class names, COCO files."""
    from maskfirst.data.shapes import write_demo

    pictures = write_demo(out, count)
    print(f"{len(pictures)} pictures with their truth in {out}")


@app.command()
def version() -> None:
    """Print the version."""
    from maskfirst import __version__

    print(__version__)


def main() -> None:
    """The entry point: a UserError is one line on stderr and exit code 2."""
    # Threads of OpenMP that wait by spinning keep each other from the cores that they wait for: beside one other busy
    # process a training took 5 times as long. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        print(f"maskfirst: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _experiment(name: str, changes: list[str] | None) -> "Experiment":
    """The experiment of a recipe, all that needs neither data nor weights being checked."""
    from maskfirst import recipe
    from maskfirst.build import Experiment

    experiment = Experiment(recipe.load(name, changes or []))
    experiment.check()
    return experiment


def _chief() -> bool:
    """Whether this process speaks for all that a run was given, however they were started."""
    return not any(int(os.environ.get(rank, 0)) for rank in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _predict_shards(job: "Job", paths: list[str], crew: "Crew", as_json: bool) -> None:
    from maskfirst.shards.run import predict_shards

    # What Ray prints on stdout is not what was asked for.
    with _bar("predicting", _chief(), "shards") as advance, contextlib.redirect_stdout(sys.stderr):
        made = predict_shards(job, paths, crew, advance)
    if not _chief():
        return
    if as_json:
        _print_json(made.as_json())
    else:
        earlier = f", {made.kept} of them by an earlier run" if made.kept else ""
        where = Path(job.out) / "shards"
        print(f"{made.pictures} pictures in {made.shards} shards{earlier}, by {job.weights}; see {where}")
    _end(made.errors)


def _refuse(sentence: str, **options: object) -> None:
    """Raises UserError with the first option that is said in place of `{}`."""
    for name, value in options.items():
        if value is not None:
            raise UserError(sentence.format(f"--{name.replace('_', '-')}"))


def _loaded(name: str, wanted: Engine | None, device: str, trust: bool) -> "Segmenter":
    """The model of weights, or of an .onnx file, run by what is wanted."""
    from maskfirst import build, engine

    graph = engine.is_graph(name)
    if wanted is Engine.onnx and not graph:
        raise UserError(f"--engine onnx: {name} is no .onnx file; 'maskfirst export {name} --out model.onnx' makes one")
    if wanted is Engine.torch and graph:
        raise UserError(f"--engine torch: {name} is run by onnxruntime; give the weights that it was exported from")
    return engine.load(name, trust) if graph else build.load(name, device, trust)


def _of_weights(name: str, changes: list[str] | None, trusted: bool) -> "Experiment":
    """The experiment of the recipe in weights, or in an .onnx file."""
    from dataclasses import replace

    from maskfirst import engine, recipe, weights
    from maskfirst.build import Experiment

    file = engine.read(name) if engine.is_graph(name) else weights.read(name)
    changed = recipe.override(file.recipe, changes or [])
    return Experiment(replace(changed, trusted=trusted), file.vocabulary)


def _saved(masks: Path, segmenter: "Segmenter", named: bool) -> "Proposer":
    """The masks of a file, opened. `named`: what it calls them is wanted, and must be of the vocabulary."""
    from maskfirst.proposers.saved import Saved

    found = Saved(segmenter.vocabulary, str(masks), named)
    # Now, so that a wrong path is told before any picture is read.
    return found.opened()


def _composed(
    segmenter: "Segmenter",
    saved: "Proposer | None",
    true_masks: bool,
    names: str | None,
    blend: float | None,
    trust: bool,
) -> "Segmenter":
    """The model with the masks and names that the options of `evaluate` and `predict` ask for."""
    from maskfirst import build
    from maskfirst.compose import WEIGHT, with_masks, with_names
    from maskfirst.proposers.oracle import OracleProposer
    from maskfirst.weights import require_same_vocabulary

    if names is not None:
        other = build.load(names, segmenter.device, trust)
        require_same_vocabulary(segmenter.vocabulary, other.vocabulary, names)
        segmenter = with_names(segmenter, other, WEIGHT if blend is None else blend)
    elif blend is not None and saved is None:
        segmenter = with_names(segmenter, segmenter, blend)
    if saved is not None:
        return with_masks(segmenter, saved, blend)
    if true_masks and segmenter.point_namer is not None:
        return with_masks(segmenter, OracleProposer(segmenter.vocabulary))
    if true_masks:
        segmenter.proposer = OracleProposer(segmenter.vocabulary)
    return segmenter


def _names_weights(text: str) -> bool:
    """Whether a word is meant as weights: it has their ending, or is a run folder or a bundled name."""
    from maskfirst.weights import PICKLES, WeightsError, locate

    path = Path(text)
    if text.startswith("hub:") or path.suffix.lower() in (".safetensors", ".onnx", *PICKLES):
        return True
    if path.is_file():
        return False
    try:
        locate(text)
    except WeightsError:
        return False
    return True


def _weights_and_paths(arguments: list[str], weights: str | None) -> tuple[str, list[str]]:
    if weights is not None:
        return weights, arguments
    first, *others = arguments
    if not _names_weights(first):
        return DEFAULT, arguments
    if not others:
        raise UserError(f"predict {first}: weights, but no pictures; name files, folders or globs after them")
    return first, others


def _split(said: list[str] | None, known: Sequence[str], only: bool, as_published: bool) -> "SeenSplit | None":
    """Which classes are unseen: those of the command, or the recipe's; None where neither says any."""
    from maskfirst.data.zero_shot import bundled, names_of
    from maskfirst.metrics.seen import Split as SeenSplit

    # One word may be a list's; several, or a class's name, are names.
    alone = said is not None and len(said) == 1 and (said[0] in bundled() or Path(said[0]).is_file())
    unseen = names_of(said[0] if said is not None and alone else said) if said else tuple(known)
    if not unseen:
        if only or as_published:
            option = "--only-unseen" if only else "--as-published"
            raise UserError(f"{option}: which classes are unseen? Say it by --unseen, or as `unseen` in the recipe")
        return None
    return SeenSplit(frozenset(unseen), only, as_published)


def _datasets(what: str, changes: list[str] | None) -> tuple[dict[str, "Dataset"], tuple[str, ...]]:
    """The splits of a recipe, or of a folder in the layout that the data set `folder` reads, and the unseen names."""
    from maskfirst.build import SPLITS
    from maskfirst.data.folder import Folder

    if Path(what).is_dir():
        if changes:
            raise UserError(f"check {what}: --set changes a recipe, and this is a folder; write a recipe for it")
        there = [split for split in SPLITS if Path(what, "images", split).is_dir()] or ["train"]
        return {split: Folder(what, split=split) for split in there}, ()
    experiment = _experiment(what, changes)
    said = experiment.recipe.tree.get("data") or {}
    return {split: experiment.dataset(split) for split in SPLITS if said.get(split)}, experiment.unseen


def _colors(vocabulary: "Vocabulary", source: str) -> list[tuple[int, int, int]]:
    """The colours of `vocabulary`, those of another one for the names that both have, or in order where there is none."""
    from maskfirst.data.vocabulary import load

    other = load(source)
    found = dict(zip(other.names, other.colors, strict=True))
    if not set(found) & set(vocabulary.names):
        if len(other) != len(vocabulary):
            raise UserError(
                f"--colors {source}: {len(other)} colours by other names than the model's {len(vocabulary)} classes "
                f"({', '.join(vocabulary.names[:5])}, ...); name colours for these"
            )
        return [*other.colors]
    return [found.get(name, color) for name, color in zip(vocabulary.names, vocabulary.colors, strict=True)]


def _micro(batch: str) -> str:
    if batch != "auto" and not (batch.isdecimal() and int(batch) > 0):
        raise UserError(f"--batch {batch}: should be a number of pictures, or auto{nearest(batch, ['auto'])}")
    return batch


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size {text}: should look like 512x768, height first")
    return int(height), int(width)


@contextlib.contextmanager
def _bar(what: str, shown: bool, unit: str = "img") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and time left, if that is a terminal; told (done, all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=None, rate="")

        def advance(done: int, total: int) -> None:
            speed = progress.tasks[task].speed
            progress.update(task, completed=done, total=total, rate="" if speed is None else f"{speed:.3g} {unit}/s")

        yield advance


def _print(what: "RenderableType") -> None:
    from rich.console import Console

    # No markup: names of classes may have square brackets.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(what)


def _print_json(content: Any) -> None:
    print(json.dumps(_finite(content), indent=1, ensure_ascii=False))


def _finite(content: Any) -> Any:
    """The content with None for NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _end(failed: list[str]) -> None:
    """Names what could not be read; with exit code 1 if there is any, the rest having been done."""
    for error in failed:
        print(f"maskfirst: skipped: {error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _print_report(report: "Report") -> None:
    from rich.table import Table

    table = Table()
    table.add_column("class")
    for split, count in report.images.items():
        table.add_column(f"{split}: {count} pictures", justify="right")
    totals = {
        split: sum(each.pixels for each in found) + report.void[split] for split, found in report.frequencies.items()
    }

    def share(split: str, pixels: int) -> str:
        return f"{pixels / totals[split]:.2%}" if totals[split] else "-"

    for rows in zip(*report.frequencies.values(), strict=False):
        cells = (
            f"{share(split, row.pixels)} in {row.images}" for split, row in zip(report.frequencies, rows, strict=True)
        )
        table.add_row(rows[0].name, *cells)
    table.add_row("without a class", *(share(split, pixels) for split, pixels in report.void.items()), style="dim")
    if any(report.empty.values()):
        table.add_row("nothing with a class", *(f"in {count}" for count in report.empty.values()), style="dim")
    _print(table)
    for problem in report.problems:
        print(f"- {problem}")
        for item in problem.items[:10]:
            print(f"    {item}")
        if len(problem.items) > 10:
            print(f"    and {len(problem.items) - 10} more")
    found = f"{len(report.problems)} problems" if report.problems else "nothing wrong"
    print(found if report.sheet is None else f"{found}; see {report.sheet}")


def _cost_as_json(found: "Cost") -> dict[str, Any]:
    memory = found.memory
    return {
        "size": found.size,
        "parameters": found.parameters,
        "parameters_by_part": dict(found.parameters_by_part),
        "multiply_adds": found.multiply_adds,
        "multiply_adds_by_operator": dict(found.by_operator),
        "training_bytes": {"per_image": memory.activations, "once": memory.total(0)},
    }


def _cost_as_table(found: "Cost") -> "RenderableType":
    from rich.table import Table

    height, width = found.size
    memory = found.memory
    table = Table(title=f"one picture of {height} x {width} px", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", _short(found.parameters))
    for part, count in found.parameters_by_part.items():
        table.add_row(f"  {part}", _short(count), style="dim")
    table.add_row("multiply-adds", _short(found.multiply_adds))
    for operator, count in found.by_operator.items():
        table.add_row(f"  {operator}", _short(count), style="dim")
    table.add_row("memory to train (fp32, AdamW)", f"{_short(memory.total(1), 1024)}B")
    table.add_row("  each picture", f"{_short(memory.activations, 1024)}B", style="dim")
    table.add_row("  weights, gradients, optimizer", f"{_short(memory.total(0), 1024)}B", style="dim")
    return table


def _short(count: int | float, thousand: int = 1000) -> str:
    """A count with its unit, such as 120.9 G; with `thousand` 1024, such as 1.5 Gi."""
    units = ("", "k", "M", "G", "T") if thousand == 1000 else ("", "Ki", "Mi", "Gi", "Ti")
    power = 0
    while count >= thousand and power + 1 < len(units):
        count, power = count / thousand, power + 1
    return f"{count:.4g} {units[power]}"
