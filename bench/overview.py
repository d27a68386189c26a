"""The suite's short table: a line per row that has a time, the recipes of one op in one line, what failed and why."""

from typing import Any

Row = dict[str, Any]


def table(rows: list[Row]) -> list[str]:
    """As lines of text; profile rows that went well are left to the profile's own table."""
    head = f"{'stage':9s} {'row':52s} {'batch':>5s} {'p50 ms':>9s} {'images/s':>10s} {'floor':>6s} {'× example':>9s}"
    lines, works = [head], {}
    for row in rows:
        if row["suite"] == "profile" and row["ok"]:
            continue
        if row["suite"] == "ops" and row["ok"] and "recipe" in row:
            works.setdefault(row["name"].replace(f"/{row['recipe']}/", "/"), []).append(row)
        else:
            lines.append(line(row))
    return lines + [op_line(name, members) for name, members in works.items()]


def line(row: Row) -> str:
    name = row["name"] if row.get("group") != "scaling" else f"{row['name']} {row['image_size']}px f{row['ngf']}"
    text = f"{row['suite']:9s} {name[:52]:52s} {row.get('batch', ''):>5}"
    if "images_per_s" in row:
        text += f" {row['p50_ms']:9.3f} {row['images_per_s']:10.1f}"
        text += f" {row['roofline']:6.2f}" if row.get("roofline") is not None else " " * 7
        text += f" {row['over_example']:9.2f}" if "over_example" in row else ""
        text += f"  without {row['off']} {row['gain']:.2f} times as long" if "gain" in row else ""
        text += {True: "  noisy", False: ""}.get(row.get("noisy", False), "  too few rounds to tell noise")
    elif "matrix_tflops" in row:
        text += f" {row['matrix_tflops']:9.3f} TFLOP/s"
    elif "copy_tbps" in row or "l2_tbps" in row:
        text += f" {row.get('copy_tbps', row.get('l2_tbps')):9.4f} TB/s"
    elif "node_us" in row:
        gaps = {key[:-3].replace("_", " "): row[key] for key in row if key.endswith("_us") and row[key] is not None}
        text += " " + ", ".join(f"{what} {us:.2f} µs" for what, us in gaps.items())
    elif row.get("us") is not None:
        text += f" {row['us']:9.1f} µs, library {row.get('library_us') or float('nan'):.1f}"
    elif "checked" in row:
        text += f" {row['checked']:9d} checked"
    if row.get("throttle"):
        text += f"  throttled: {', '.join(row['throttle'])}"
    if row.get("median_over_shortest", 1.0) > 1.1:
        text += f"  busy: the median took {row['median_over_shortest']:.2f} times the shortest"
    if row["ok"] is not True:
        text += f"  {'failed' if row['ok'] is False else 'not run'}: {row['why']}"
    return text.rstrip()


def op_line(name: str, rows: list[Row]) -> str:
    """One piece of work: each recipe's microseconds, the fastest first, and what part of its time the floor is."""
    ordered = sorted(rows, key=lambda row: row["p50_ms"])
    times = ", ".join(f"{row['recipe']} {row['p50_ms'] * 1e3:.1f}" for row in ordered)
    best = ordered[0].get("roofline")
    return f"{'ops':9s} {name[:52]:52s} {times} µs" + (f"; floor {best:.2f}" if best else "")
