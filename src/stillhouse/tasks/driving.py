"""Driving: objects on the ground around a vehicle, found in bird's-eye view.

`GridNet` wraps every detector that ends in a map over the ground, whatever sensors it reads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.artifact import Predictor
from stillhouse.batch import Batch, Splits, read_rows
from stillhouse.errors import DataError, ModelError, nearest
from stillhouse.losses.bev import centre_focal
from stillhouse.metrics.centre_distance import CentreDistance, Detections
from stillhouse.net import Net, Output
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.bev_pictures import camera_picture, from_above, map_picture
from stillhouse.parts.centre_maps import (
    BRANCHES,
    at_centres,
    centre_targets,
    class_maps,
    decode_centres,
)
from stillhouse.task import Metric, Task

Head = dict[str, Tensor]
# What other detectors call the branches of a centre head (OpenPCDet, mmdetection3d).
_NAMES = {
    "heatmap": "hm",
    "center": "reg",
    "center_z": "height",
    "dims": "dim",
    "velocity": "vel",
}
_WEIGHTS = {"vel": 0.2}
_BOX_WEIGHT = 0.25


def heads_of(found: Any) -> list[Head]:
    """The tasks' branches in whatever a detector returns: nests of lists, tuples and mappings.

    Raises:
        ModelError: no mapping with heat maps in it.
    """
    heads = list(_heads(found))
    if not heads:
        kind = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise ModelError(
            f"no centre head in {kind}: a mapping with 'hm' (or 'heatmap'), reg, height, dim and "
            "rot is needed, or a list of them; map the tap 'head' to the module that returns it"
        )
    return heads


def _heads(found: Any) -> Iterator[Head]:
    if isinstance(found, Mapping):
        named = {_NAMES.get(str(k), str(k)): v for k, v in found.items()}
        if isinstance(named.get("hm"), Tensor):
            yield {k: v for k, v in named.items() if k == "hm" or k in BRANCHES}
            return
        for key in ("head", "pred_dicts", "preds"):
            if key in found:
                yield from _heads(found[key])
                return
    elif isinstance(found, (list, tuple)):
        for entry in found:
            yield from _heads(entry)


@dataclass(frozen=True)
class Detecting:
    """How boxes are read from heat maps.

    Attributes:
        most: boxes of a frame.
        least_score: below it nothing is told.
        apart: metres; a weaker box of the same class nearer than that is dropped.
    """

    most: int = 50
    least_score: float = 0.05
    apart: float = 1.0


class GridNet(Net):
    """A detector over the ground, called on whatever sensors it reads.

    The view is a mapping of sensors' tensors (see `data/bev_frames.py`). A module whose `forward`
    names them gets those it names; one with a single parameter of another name gets the mapping.
    What it returns may be the house's `{"head": [...]}` or a nest as OpenPCDet's and
    mmdetection3d's centre heads give it; the tap "head" may name the module that gives it.

    Args:
        module: the detector. Its attributes `grid` (else `grid` here), `axes` ("yx": maps are
            (B, C, y, x); "xy") and `taps` (alias to path) are honoured.
        grid: ground that its maps cover.
        taps: alias to module path: "low" before the BEV encoder, "high" after it, "head".

    Attributes:
        grid: of its maps.
    """

    def __init__(
        self, module: nn.Module, *, grid: Grid, taps: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(module, answer="head", taps=taps)
        self._nest: Any = None
        own = getattr(module, "grid", None)
        self.grid = grid if own is None else Grid.of(own)
        axes = getattr(module, "axes", "yx")
        if axes not in {"yx", "xy"}:
            raise ModelError(f"axes of {type(module).__name__} are '{axes}'; 'yx' or 'xy'")
        self._turned = axes == "xy"
        self._takes = _parameters(module)

    def add_tap(self, alias: str, path: str | None = None) -> None:
        """As `Net.add_tap`; without a path the one in place stays, or the module's own is taken."""
        own = getattr(self.module, "taps", None)
        if path is None:
            if alias in self.taps:
                return
            path = own.get(alias) if isinstance(own, Mapping) else None
        super().add_tap(alias, path)

    def _keep(self, alias: str, wanted: int, value: Any) -> None:
        if alias != "head":
            super()._keep(alias, wanted, value)
            return
        self._nest = value
        super()._keep(alias, wanted, next(iter(heads_of(value)[0].values())))

    def _call(self, view: Any) -> Any:
        if not isinstance(view, Mapping):
            return super()._call(view)
        if self._takes is None:
            return self.module(**view)
        named = {k: v for k, v in view.items() if k in self._takes}
        return self.module(**named) if named else self.module(dict(view))

    def _named(self, out: Any) -> Output:
        return {"answer": out}

    def forward(self, view: Any) -> Output:
        """Call the detector.

        Returns:
            `head`, a list of branches by task; `heat` (B, K, H, W), the heat maps' logits of
            all tasks; `regression` (B, R, H, W), their branches in the order of `BRANCHES`,
            task by task; `grid`; and `taps`.
        """
        found = super().forward(view)
        taps: dict[str, Tensor] = dict(found.get("taps", {}))
        if taps.pop("head", None) is not None:
            heads, self._nest = heads_of(self._nest), None
        else:
            heads = heads_of(found["answer"])
        if self._turned:
            taps = {k: v.transpose(-1, -2) for k, v in taps.items()}
            heads = [{k: v.transpose(-1, -2) for k, v in h.items()} for h in heads]
        branches = [head[name] for head in heads for name in BRANCHES if name in head]
        out: Output = {
            "head": heads,
            "heat": torch.cat([head["hm"] for head in heads], 1),
            "regression": torch.cat(branches, 1),
            "grid": self.grid,
        }
        if self.taps:
            out["taps"] = taps
        return out

    def loss(self, out: Output, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `detection_loss`."""
        return detection_loss(out["head"], targets, self.grid)

    def decode(self, out: Output, how: Detecting | None = None) -> Detections:
        """See `detections`."""
        return detections(out["head"], self.grid, how or Detecting())


def _parameters(module: nn.Module) -> set[str] | None:
    """Names that `forward` takes; None when it takes any."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def detection_loss(
    heads: Sequence[Head], targets: Mapping[str, Tensor], grid: Grid
) -> dict[str, Tensor]:
    """The loss of CenterPoint (Yin et al., CVPR 2021), means over the boxes of the batch.

    Args:
        heads: branches by task; the classes of the tasks follow one another.
        targets: `boxes` (B, M, 7 or 9), `labels`, `valid` (B, M).
        grid: whose range the maps cover. Boxes whose centre lies beyond it do not count.

    Returns:
        `task/heat`, the focal loss of the heat maps, and `task/boxes`, 0.25 times the L1 of the
        branches at the boxes' centres (velocity weighs 0.2).
    """
    boxes, labels = targets["boxes"], targets["labels"]
    shown = targets["valid"] & grid.inside(boxes)
    boxes_of = boxes.to(heads[0]["hm"].dtype)
    first, focal, distance = 0, [], []
    for head in heads:
        own, classes = grid.over(head["hm"]), head["hm"].shape[1]
        here = shown & (labels >= first) & (labels < first + classes)
        heat = class_maps(boxes, labels - first, here, own, classes)
        focal.append(centre_focal(head["hm"], heat).sum())
        wanted = centre_targets(boxes_of, own)
        for name, values in wanted.items():
            if name in head:
                away = (at_centres(head[name], boxes, own) - values).abs().sum(-1)
                distance.append(_WEIGHTS.get(name, 1.0) * (away * here).sum())
        first += classes
    count = shown.sum().clamp(min=1)
    return {
        "task/heat": torch.stack(focal).sum() / count,
        "task/boxes": _BOX_WEIGHT * torch.stack(distance).sum() / count,
    }


def boxes_in_batch(batch: Mapping[str, Tensor], grid: Grid) -> Tensor:
    """How many boxes of a batch lie on the grid; 1 at least: what `task` terms are means over."""
    return (batch["valid"] & grid.inside(batch["boxes"])).sum().clamp(min=1)


def detections(heads: Sequence[Head], grid: Grid, how: Detecting) -> Detections:
    """Boxes of all tasks, frame by frame, by falling score."""
    first, found = 0, []
    for head in heads:
        found.append(
            decode_centres(
                head,
                grid,
                first_label=first,
                most=how.most,
                least_score=how.least_score,
                apart=how.apart,
            )
        )
        first += head["hm"].shape[1]
    joined = []
    for parts in zip(*found, strict=True):
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = whole["scores"].argsort(descending=True, stable=True)[: how.most]
        joined.append({name: value[order] for name, value in whole.items()})
    return joined


class Driving(Task):
    """Detection in bird's-eye view.

    Batches are those of `data/bev_frames.py`; `about` of the splits holds "categories" and
    "grid". Figures are mean average precision by centre distance and the translation error,
    over all boxes and over those with few (at most 15) and with many LiDAR points.
    """

    name: ClassVar[str] = "driving"
    main_metric: ClassVar[str] = "map"
    evaluation_batch: ClassVar[int] = 8

    def __init__(self, splits: Splits) -> None:
        super().__init__(splits)
        for key in ("categories", "grid"):
            if len(splits) and key not in self.about:
                raise DataError(f"the data '{splits.edition}' does not say its {key}")

    @property
    def grid(self) -> Grid:
        """The ground that boxes are looked for on."""
        return Grid.of(self.about["grid"])

    @property
    def categories(self) -> list[str]:
        """Names of the classes."""
        return [str(name) for name in self.about["categories"]]

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> GridNet:
        """Wrap a detector."""
        return GridNet(module, grid=self.grid, taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `detection_loss`."""
        return detection_loss(out["head"], batch, out["grid"])

    def metrics(self) -> Mapping[str, Metric]:
        """See `metrics.centre_distance`."""
        groups = {"few_points": lambda seen: seen <= 15, "many_points": lambda seen: seen > 15}

        def detect(out: Mapping[str, Any]) -> Detections:
            return detections(out["head"], out["grid"], Detecting())

        return {"detection": CentreDistance(self.categories, detect, groups)}

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse detectors that cannot read the data or know other classes."""
        view = self.example_view()
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net, view)

    def _check_net(self, role: str, net: Net, view: Batch) -> None:
        name = type(net.module).__name__
        try:
            out = net.tried(view)
        except ModelError as error:
            raise ModelError(f"the {role} {name}: {error}") from error
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise ModelError(
                f"the {role} {name} cannot read frames with {sorted(view)}: {error}"
            ) from error
        found, wanted = out["heat"].shape[1], len(self.categories)
        if found != wanted:
            raise ModelError(
                f"the {role} {name} tells {found} classes, the data '{self.splits.edition}' has "
                f"{wanted}: {', '.join(self.categories)}"
            )
        for head in out["head"]:
            for branch, maps in head.items():
                width = BRANCHES.get(branch, maps.shape[1])
                if maps.shape[1] != width or maps.shape[-2:] != head["hm"].shape[-2:]:
                    raise ModelError(
                        f"the {role} {name}: the branch '{branch}' gives {tuple(maps.shape)} "
                        f"beside heat maps of {tuple(head['hm'].shape)}; {width} channels of the "
                        "same size are needed"
                    )

    def example_view(self, view: str = "x") -> Any:
        """One frame."""
        return self.first_rows().view(view)

    def predictor(self, net: Net) -> Predictor:
        """Frames in, boxes out."""
        settings: dict[str, Any] = {"categories": self.categories, "grid": self.grid.plain()}
        if "head" in net.taps:
            settings["taps"] = {"head": net.taps["head"]}
        return BevDetector(net, settings)

    def details(self, job: Any, artifact: Any, teacher: Net | None) -> dict[str, Any]:
        """Frames from above with their boxes, and the maps of teacher and student."""
        if artifact.predictor is None:
            return {}
        return {"images": _pictures(job, artifact.module, teacher, self.categories)}


def _pictures(
    job: Any, student: Net, teacher: Net | None, categories: Sequence[str], most: int = 2
) -> list[dict[str, str]]:
    """Frames of the test split: boxes from above, maps of teacher and student, camera views."""
    source = job.splits["test" if "test" in job.splits else "val"]
    batch = read_rows(source, torch.arange(min(most, len(source))), None).to(job.device)
    how = Detecting(least_score=0.3)
    found: dict[str, Any] = {}
    for role, net in (("student", student), ("teacher", teacher)):
        if isinstance(net, GridNet):
            out = net.tried(batch.view("x"))
            found[role] = (detections(out["head"], out["grid"], how), out)
    pictures = []
    for row in range(len(batch["boxes"])):
        valid = batch["valid"][row]
        true = batch["boxes"][row][valid].cpu()
        points = batch["x"]["points"][row, : int(batch["x"]["point_count"][row])].cpu()
        for role, (boxes, out) in found.items():
            told = boxes[row]["boxes"].cpu()
            drawn = from_above(points, true, told, out["grid"])
            pictures.append(
                {
                    "title": f"Frame {row + 1} from above: {role}",
                    "caption": "green: true boxes; red: found ones (score above 0.3)",
                    "png_base64": drawn,
                }
            )
            maps = {"heat": out["heat"][row].sigmoid().amax(0).cpu()}
            for alias, value in out.get("taps", {}).items():
                maps[alias] = value[row].float().abs().mean(0).cpu()
            for name, value in maps.items():
                pictures.append(
                    {
                        "title": f"Frame {row + 1}, map '{name}': {role}",
                        "caption": "strength over the ground, with the true boxes",
                        "png_base64": map_picture(value, true, out["grid"]),
                    }
                )
        if "images" in batch["x"]:
            told = found["student"][0][row]["boxes"].cpu() if "student" in found else true[:0]
            pictures.append(
                {
                    "title": f"Frame {row + 1} from the cameras",
                    "caption": "green: true boxes; red: those that the student found",
                    "png_base64": camera_picture(
                        batch["x"]["images"][row].cpu(),
                        batch["x"]["intrinsics"][row].cpu(),
                        batch["x"]["cameras"][row].cpu(),
                        [(true, "green"), (told, "red")],
                    ),
                }
            )
    return pictures


class BevDetector(Predictor):
    """Finds objects in frames: point clouds, or files of arrays with images and calibration."""

    reads: ClassVar[str] = (
        ".bin point clouds (float32 x, y, z, intensity ...), or .npz frames with points, images, "
        "intrinsics and cameras"
    )
    writes: ClassVar[str] = "jsonl: one line a frame with its boxes"
    options: ClassVar[Mapping[str, str]] = {
        "columns": "numbers a point of a .bin file has (4; nuScenes: 5)",
        "score": "least score of a box (0.3)",
    }

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(module, settings)
        if not isinstance(module, GridNet):
            # A reopened artifact knows a plain net only.
            inner = module.module if isinstance(module, Net) else module
            grid, taps = Grid.of(self.settings["grid"]), self.settings.get("taps")
            self.module = GridNet(inner, grid=grid, taps=taps).eval()

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """Boxes of frames.

        Args:
            inputs: mappings of arrays as in the view "x", without the rows' dimension.
            options: see `options`.

        Returns:
            Per frame a list of {"category", "score", "box": x, y, z, l, w, h, yaw[, vx, vy]}.
        """
        how = Detecting(least_score=float(options.get("score", 0.3)))
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        found = []
        for frame in inputs:
            view = _frame_view(frame).to(device)
            with torch.no_grad():
                out = self.module(view)
            found.append(self._told(detections(out["head"], out["grid"], how)[0]))
        return found

    def _told(self, boxes: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        names = self.settings["categories"]
        return [
            {"category": names[int(label)], "score": float(score), "box": box.tolist()}
            for box, score, label in zip(
                boxes["boxes"].cpu(), boxes["scores"].cpu(), boxes["labels"].cpu(), strict=True
            )
        ]

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Read frames, write one line of JSON a frame."""
        unknown = [key for key in options if key not in self.options]
        if unknown:
            raise DataError(f"no option '{unknown[0]}'{nearest(unknown[0], self.options)}")
        columns = int(options.get("columns", 4))
        files = [file for given in inputs for file in _files(given)]
        lines = []
        for file in files:
            boxes = self.predict([read_frame(file, columns)], **dict(options))[0]
            lines.append(json.dumps({"file": file.name, "boxes": boxes}))
        text = "\n".join(lines) + "\n"
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        return {"frames": len(files), "text": text if output is None else str(output)}


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        found = sorted(p for p in given.iterdir() if p.suffix in {".bin", ".npz"})
        if not found:
            raise DataError(f"the folder {given} holds no .bin or .npz frames")
        return found
    if not given.is_file():
        raise DataError(f"there is no file {given}")
    return [given]


def read_frame(file: Path, columns: int = 4) -> dict[str, Any]:
    """A frame's arrays from a .bin cloud or an .npz of arrays.

    Raises:
        DataError: another kind of file, a damaged one, or another number of columns.
    """
    if file.suffix == ".bin":
        flat = np.fromfile(file, dtype=np.float32)
        if columns < 3 or len(flat) % columns or not np.isfinite(flat).all():
            raise DataError(
                f"{file} holds {len(flat)} numbers, no whole points of {columns}; say how many a "
                "point has with -o columns=5"
            )
        return {"points": flat.reshape(-1, columns)}
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
    raise DataError(f"{file}: a .bin point cloud or an .npz of arrays is read")


def _frame_view(frame: Mapping[str, Any]) -> Batch:
    view = Batch()
    for name in ("points", "images", "intrinsics", "cameras"):
        if name in frame:
            value = torch.as_tensor(np.ascontiguousarray(frame[name]))
            if value.dtype == torch.uint8:
                value = value.float() / 255.0
            view[name] = value.float()[None]
    if "points" in view:
        if view["points"].shape[-1] == 3:
            view["points"] = nn.functional.pad(view["points"], (0, 1))
        view["point_count"] = torch.tensor([view["points"].shape[1]])
    if not view:
        raise DataError(
            f"a frame has points, or images with intrinsics and cameras, not {sorted(frame)}"
        )
    return view
