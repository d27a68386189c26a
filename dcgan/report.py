"""`report.html` of a run: one page that needs a browser and nothing else, no network, no other file.

What the files of the run say is escaped, and a content security policy lets no script run but the page's own.
"""

import base64
import hashlib
import io
import json
import os
import re
from html import escape
from pathlib import Path

from PIL import Image

from dcgan import progress
from dcgan.curves import chart, decimals, number, speed
from dcgan.page import SCRIPT, STYLE

SNAPSHOTS = 12
EMBED_BYTES = 400_000  # a larger picture is embedded smaller, so that the page stays some megabytes
EMBED_PIXELS = 1024  # the longer side of a picture embedded smaller
LARGEST = 16_000_000  # pixels of a picture that is opened at all
PROBABILITIES = (
    ("d_real", "real: D(x)"),
    ("d_fake_before", "fake: D(G(z))"),
    ("d_fake_after", "fake, after D's update"),
)


def write_report(run_dir: str | Path) -> Path:
    """Make `report.html` of what is in a run's directory, finished or not; what is missing is left out of the page.

    Args:
        run_dir: the directory, with any of `config.json`, `metrics.jsonl`, `samples/real.png`, `samples/step_*.png`.

    Returns:
        The page's path. It is replaced in one move: a browser never loads half of it.

    Raises:
        OSError: the page cannot be written, or a file that is there cannot be read.
    """
    run_dir = Path(run_dir)
    page = render(_config(run_dir / "config.json"), progress.read(run_dir / "metrics.jsonl"), run_dir / "samples")
    path = run_dir / "report.html"
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate from a file's name has no UTF-8
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def render(config: dict, lines: list[dict], samples: Path) -> str:
    """The page: HTML from a run's configuration, its metrics and the folder of its samples."""
    known = {**config, **(config["resolved"] if isinstance(config.get("resolved"), dict) else {})}
    data = str(known.get("dataset") or Path(str(known.get("data", "unknown data"))).name)
    title = escape(f"{known.get('preset') or 'DCGAN'} on {data}")
    how = [known.get("device_name") or known.get("device"), known.get("precision"), known.get("fused") and "fused"]
    policy = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    curves = (
        chart("Losses", (("loss_d", "D"), ("loss_g", "G")), lines)
        + chart("D's probability that a picture is real", PROBABILITIES, lines, top=1.0, mark=0.5)
        + chart("Images per second", (("images_per_s", "training"),), lines, form=speed)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{policy}'">
<title>{title}</title><style>{STYLE}</style></head><body>
<header><h1>{title}</h1><p class="soft">{escape(" · ".join(str(part) for part in how if part))}</p>
{_facts(known, lines)}</header>
{_section("Samples", _samples(samples, data))}
{_section("Curves", f'<div class="charts">{curves}</div>' if curves else '<p class="soft">No metrics yet.</p>')}
{_section("Which backend ran each layer, and why", _backends(known.get("backends")))}
{_section("Configuration", _settings(config))}
<footer>Made from config.json, metrics.jsonl and samples/ in this folder.</footer>
<script>{SCRIPT}</script></body></html>
"""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}</section>" if body else ""


def _config(path: Path) -> dict:
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _facts(known: dict, lines: list[dict]) -> str:
    """The figures under the title."""
    if not lines:
        return ""
    last = {key: number(lines[-1].get(key)) for key in progress.FIELDS}
    step, total, epochs = int(last["step"] or 0), number(known.get("steps")), number(known.get("epochs"))
    batch, images, per_epoch = (number(known.get(key)) for key in ("batch_size", "images", "steps_per_epoch"))
    seen = batch and step * batch
    if images and per_epoch:  # the last batch of an epoch is smaller
        seen = step // per_epoch * images + step % per_epoch * (batch or images / per_epoch)
    speeds = [v for line in lines if (v := number(line.get("images_per_s"))) is not None]
    facts = (
        ("Steps", f"{step:,}", f"of {total:,.0f}" if total and total != step else ""),
        (
            "Epochs",
            "–" if last["epoch"] is None else f"{last['epoch']:.2f}".rstrip("0").rstrip("."),
            f"of {epochs:g}" if epochs else "",
        ),
        ("Images seen", "–" if seen is None else f"{seen:,.0f}", ""),
        ("Training time", "–" if last["seconds"] is None else _duration(last["seconds"]), ""),
        ("Images/s, mean", speed(sum(speeds) / len(speeds) if speeds else None), f"last {speed(last['images_per_s'])}"),
        ("Last losses, D / G", f"{decimals(last['loss_d'])} / {decimals(last['loss_g'])}", ""),
    )
    items = (f"<div><dt>{name}</dt><dd>{value} <small>{more}</small></dd></div>" for name, value, more in facts)
    return f'<dl class="facts">{"".join(items)}</dl>'


def _duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _picture(path: Path, alt: str, name: str = "") -> str:
    """An `img` with the picture inside, or nothing where it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > LARGEST:
                return ""
            image.load()
            content, kind = path.read_bytes(), "png"
            if len(content) > EMBED_BYTES:
                image.thumbnail((EMBED_PIXELS, EMBED_PIXELS))
                image.save(smaller := io.BytesIO(), "WEBP", quality=90)
                content, kind = smaller.getvalue(), "webp"
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    look = ' class="small"' if max(width, height) < EMBED_PIXELS // 2 else ""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img{name}{look} width="{width}" height="{height}" alt="{escape(alt)}" src="{source}">'


def _samples(folder: Path, data: str) -> str:
    """Real pictures beside the last generated ones, and up to `SNAPSHOTS` of the way there."""
    found = ((re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in folder.glob("step_*.png"))
    snapshots = sorted((int(match[1]), path) for match, path in found if match)
    last, count = len(snapshots) - 1, min(len(snapshots), SNAPSHOTS)
    chosen = [snapshots[round(i * last / max(count - 1, 1))] for i in range(count)]
    strip = []
    for step, path in chosen:
        if image := _picture(path, f"Pictures that G made of the fixed noise after step {step:,}"):
            strip.append((f"step {step:,}", image))
    figures = []
    if strip:
        large = strip[-1][1].replace("<img", '<img id="large"', 1)
        caption = (
            f'<figcaption aria-live="polite"><b>Generated</b>, <span id="caption">{strip[-1][0]}</span></figcaption>'
        )
        figures.append(f"<figure>{caption}{large}</figure>")
    if real := _picture(folder / "real.png", f"Real pictures from {data}"):
        figures.append(f"<figure><figcaption><b>Real</b>, {escape(data)}</figcaption>{real}</figure>")
    pair = f'<div class="pair">{"".join(figures)}</div>' if figures else ""
    if len(strip) < 2:
        return pair
    pressed = ["false"] * (len(strip) - 1) + ["true"]
    items = (
        f'<li><button type="button" aria-pressed="{state}">{image}<span>{caption}</span></button></li>'
        for (caption, image), state in zip(strip, pressed, strict=True)
    )
    return f'{pair}<ol class="strip">{"".join(items)}</ol>'


def _backends(rows: object) -> str:
    """The table of config.json's `backends`; its columns are the keys of the rows, in the order they come."""
    if not _is_table(rows):
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_value(row.get(key))}</td>' for key in columns)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_table(rows: object) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _settings(config: dict, heading: str = "") -> str:
    """Every key of config.json; what is nested comes after the rest, under the name of its key."""
    flat = {key: value for key, value in config.items() if not isinstance(value, dict)}
    if _is_table(flat.get("backends")):
        del flat["backends"]  # has its own table
    items = "".join(f"<div><dt>{escape(key)}</dt><dd class=mono>{_value(flat[key])}</dd></div>" for key in flat)
    nested = "".join(_settings(config[key], key) for key in config if key not in flat and isinstance(config[key], dict))
    return (
        (f"<h3>{escape(heading)}</h3>" if heading and items else "")
        + (f'<dl class="config">{items}</dl>' if items else "")
        + nested
    )


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(text if len(text) <= 300 else f"{text[:280]}… ({len(text):,} characters)")
