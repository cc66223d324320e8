"""A run as one HTML page that needs only a browser: curves, completions to search and filter, the config.

The page embeds numbers and texts as JSON in an inert script element. Its own script (report.js), which the content security policy
allows by hash, shows them as text. So nothing that a model wrote can run, load anything, or be parsed as markup. The size of a page
is limited (constants below); a page says what it leaves out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from string import Template
from typing import Any

from pgrpo.commands.curves import Panel, Rows, panels_of, read_rows
from pgrpo.config import ConfigError
from pgrpo.tracking import printable
from pgrpo.tracking.thumbnails import IN_A_ROW, KEY
from pgrpo.vision.parts import size_text

MAX_POINTS = 600  # points of a curve; a longer curve is averaged
MAX_SAMPLES = 3000  # samples from training, and as many from evaluations
MAX_CHARACTERS = 3_000_000  # total length of the texts from training, and of those from evaluations
SHORTEST = 400  # a text is never cut below this many characters
MAX_IMAGES = 400  # thumbnails, of at most so many bytes each and together
MAX_IMAGE_BYTES, MAX_IMAGES_BYTES = 20_000, 2_000_000
IMAGES = ("images", "told_images")  # of the prompt, and those that tools and environments gave
SOURCES = ("training", "held out, sampled", "held out, greedy")
MODES = {"sampled": 1, "greedy": 2}

Sample = dict[str, Any]


def page(run_dir: Path, rows: Rows) -> str:
    """The page of a run with these rows of metrics.

    Raises:
        ConfigError: a line of a completions file is not a valid row.
    """
    config = run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else "config.yaml is missing"
    series, notes = _series(rows)
    trained, left_out = _read_samples([run_dir / "completions.jsonl"], "completions.jsonl")
    evaluations = sorted(run_dir.glob("eval/step_*/samples.jsonl"), key=_step_of)
    held_out, also = _read_samples(evaluations, "eval/step_*/samples.jsonl")
    samples = [*trained, *held_out]
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))
    number_of = {prompt: i for i, prompt in enumerate(prompts)}
    parts = list(dict.fromkeys(name for sample in samples for name in sample.get("parts", {})))
    images, lacking = _images(samples, run_dir / "thumbnails")
    data = {
        "series": series,
        "panels": [_panel(panel, [_text(name) for name in names], series) for panel, names in panels_of(rows)],
        "tiles": _tiles(rows),
        "sources": SOURCES,
        "parts": [_text(name) for name in parts],
        "prompts": prompts,
        "images": list(images.values()),
        "samples": [
            [
                MODES.get(sample.get("mode", ""), 0),
                sample["step"],
                number_of[sample["prompt"]],
                sample["completion"],
                _short(sample.get("reward")),
                [_short(sample.get("parts", {}).get(name)) for name in parts],
                _short(sample.get("advantage")),
                _text(sample.get("finish_reason", "")),
                *(_shown_images(sample.get(name, ()), images) for name in IMAGES if any(map(sample.get, IMAGES))),
            ]
            for sample in samples
        ],
    }
    last: dict[str, Any] = {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    here = Path(__file__).parent
    style, script = (here / f"report.{kind}" for kind in ("css", "js"))
    return Template((here / "report.html").read_text(encoding="utf-8")).substitute(
        title=_html(run_dir.resolve().name),
        subtitle=_html(_subtitle(rows, text)),
        style=style.read_text(encoding="utf-8"),
        style_hash=_hash(style),
        script=script.read_text(encoding="utf-8"),
        script_hash=_hash(script),
        # Without "<" the JSON cannot end its script element or begin a comment, whatever the texts contain.
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        numbers="".join(f"<tr><td>{_html(k)}</td><td>{v:.6g}</td></tr>" for k, v in sorted(last.items())),
        config=_html(text),
        notes="".join(f'<p class="note">{_html(note)}</p>' for note in [*notes, *left_out, *also, *lacking]),
    )


def _panel(panel: Panel, names: list[str], series: Mapping[str, Any]) -> dict[str, Any]:
    """Equal series (the total reward and the only reward function, say) are one curve with both names. A common first part of all
    names is left out of the labels."""
    equal: dict[str, list[str]] = {}
    for name in names:
        equal.setdefault(name if panel.stacked else repr(series[name]), []).append(name)
    heads = {name.partition("/")[0] for name in names}
    prefix = f"{heads.pop()}/" if len(heads) == 1 else ""
    groups = list(equal.values()) if len(names) > 1 else []
    labels = {same[0]: " = ".join(name.removeprefix(prefix) for name in same) for same in groups}
    same = [name for group in groups for name in group[1:]]
    names = [name for name in names if name not in same]
    return {
        "title": panel.title,
        "unit": panel.unit,
        "stacked": panel.stacked,
        "names": names,
        "labels": labels,
        "same": same,
    }


def _series(rows: Rows) -> tuple[dict[str, tuple[list[int], list[float]]], list[str]]:
    """Steps and values of each metric; for a long run, means over several steps, and a note that says so."""
    names = sorted({name for row in rows for name in row if name != "step"})
    series, widest = {}, 1
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        width = -(-len(points) // MAX_POINTS)
        widest = max(widest, width)
        bins = [points[i : i + width] for i in range(0, len(points), max(width, 1))]
        if points:
            values = [_short(statistics.fmean(value for _, value in some)) for some in bins]
            series[_text(name)] = [some[-1][0] for some in bins], values
    return series, [f"Curves: means over {widest} steps each; metrics.jsonl has every step."] if widest > 1 else []


def _read_samples(files: Sequence[Path], name: str) -> tuple[list[Sample], list[str]]:
    """Samples of some steps, evenly spaced and including the last one, cut to the limits of a page, with notes that say so.

    Reads the files twice, the first time only to count, so that they are never held in memory.
    """
    counts = Counter(sample["step"] for sample in _all_samples(files))
    total, steps = counts.total(), sorted(counts)
    kept, every = steps, 1
    while len(kept) > 1 and sum(counts[step] for step in kept) > MAX_SAMPLES:
        every += 1
        kept = steps[::-1][::every]
    wanted = set(kept)
    stride = -(-sum(counts[step] for step in kept) // MAX_SAMPLES)  # above 1 if a single step has more than MAX_SAMPLES
    candidates = (sample for sample in _all_samples(files) if sample["step"] in wanted)
    samples = list(islice(candidates, 0, None, max(stride, 1)))
    notes = []
    if len(samples) < total:
        steps_kept = f", those of {len(wanted):,} of {len(steps):,} steps" if len(wanted) < len(steps) else ""
        notes.append(f"The table holds {len(samples):,} of {total:,} rows of {name}{steps_kept}; the file has all.")
    room, cut = max(SHORTEST, MAX_CHARACTERS // (2 * max(len(samples), 1))), 0
    for sample in samples:
        for field in ("prompt", "completion"):
            text = str(sample.get(field, ""))
            over = len(text) - room
            cut += over > 0
            # Keep the end: of a prompt it is more specific, and of a completion it has the answer.
            sample[field] = _text(text if over <= 0 else f"[{over:,} characters left out] {text[over:]}")
    if cut:
        notes.append(f"{cut:,} texts of {name} are cut to their last {room:,} characters; the file has all of them.")
    return samples, notes


def _images(samples: Iterable[Sample], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Key -> a thumbnail's JPEG in base64, of the images that samples have, up to the limits of a page; and a note that says what
    is left out."""
    asked = (image for s in samples for name in IMAGES for image in s.get(name, ())[:IN_A_ROW])
    keys = dict.fromkeys(str(image.get("key")) for image in asked)
    found: dict[str, str] = {}
    total = 0
    for key in keys:
        path = folder / f"{key}.jpg"
        if not KEY.fullmatch(key) or path.is_symlink() or not path.is_file() or len(found) == MAX_IMAGES:
            continue
        size = path.stat().st_size
        if size <= MAX_IMAGE_BYTES and total + size <= MAX_IMAGES_BYTES:
            found[key] = base64.b64encode(path.read_bytes()).decode()
            total += size
    lacking = len(keys) - len(found)
    return found, [f"{lacking:,} of {len(keys):,} images have no thumbnail here; their sizes are shown."] * (
        lacking > 0
    )


def _shown_images(images: Sequence[Mapping[str, Any]], found: Mapping[str, str]) -> list[list[Any]]:
    """[number of its thumbnail, or -1; what is shown in its place] of each image of a row."""
    numbers = {key: i for i, key in enumerate(found)}
    return [[numbers.get(str(image.get("key")), -1), size_text(image["size"])] for image in images[:IN_A_ROW]]


def _all_samples(files: Iterable[Path]) -> Iterable[Sample]:
    """Rows of completions.jsonl, or of samples.jsonl of evaluations. The step of the latter is in the name of their folder."""
    return chain.from_iterable(
        read_rows(path, {"step": _step_of(path)} if path.name == "samples.jsonl" else {})
        for path in files
        if path.is_file()
    )


def _step_of(samples: Path) -> int:
    number = samples.parent.name.removeprefix("step_")
    if not number.isdecimal():
        raise ConfigError(f"{samples.parent}: not a folder of an evaluation; it should be called step_N")
    return int(number)


def _tiles(rows: Rows) -> list[dict[str, str]]:
    """The numbers at the top of the page."""
    tiles = []

    def ends(name: str) -> tuple[float, float] | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        some = max(1, len(values) // 20)
        return (statistics.fmean(values[:some]), statistics.fmean(values[-some:])) if values else None

    def tile(label: str, value: str, note: str) -> None:
        tiles.append({"label": label, "value": value, "note": note})

    if reward := ends("reward"):
        tile("mean reward", f"{reward[0]:.3g} → {reward[1]:.3g}", "first and last twentieth of the steps")
    for label, name in (("held out, sampled", "pass@1"), ("held out, greedy", "greedy/pass@1")):
        found = [row for row in rows if row.get(f"eval/{name}") is not None]
        if found:
            low, high = (found[-1].get(f"eval/{end}/{name}") for end in ("ci95_low", "ci95_high"))
            interval = "" if low is None or high is None else f", 95% interval {low:.3g} to {high:.3g}"
            tile(f"pass@1, {label}", f"{found[-1][f'eval/{name}']:.3g}", f"step {found[-1]['step']:,}{interval}")
    if length := ends("completions/mean_length"):
        tile("completion length", f"{length[0]:.4g} → {length[1]:.4g}", "tokens, first and last twentieth")
    if speed := [row["perf/tokens_per_s"] for row in rows if row.get("perf/tokens_per_s") is not None]:
        tile("throughput", f"{statistics.median(speed):,.0f}", "packed tokens a second, median")
    if seconds := sum(row.get("time/step") or 0.0 for row in rows):
        tile("time in steps", _duration(seconds), f"{seconds / len(rows):.3g} s a step")
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _subtitle(rows: Rows, config: str) -> str:
    """The model's path and the last step. Reads the path from the text, so that a run with a broken config still has a page."""
    lines = config.splitlines()
    start = lines.index("model:") + 1 if "model:" in lines else len(lines)
    model = next((line.partition(":")[2].strip() for line in lines[start:] if line.strip().startswith("path:")), "")
    return f"{model + ', ' if model else ''}step {rows[-1]['step']:,}"


def _short(value: float | None) -> float | None:
    """Round to six digits, which is all that a curve shows, to keep the file small."""
    return None if value is None else float(f"{value:.6g}")


def _text(text: str) -> str:
    """Escape unprintable characters, except tabs and line ends."""
    return "\t".join(map(printable, str(text).split("\t")))


def _html(text: str) -> str:
    return html.escape(_text(text))


def _hash(file: Path) -> str:
    """The sha256, in base64, by which a content security policy allows an inline style or script."""
    return base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
