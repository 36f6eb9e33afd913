"""Draw docs/architecture.svg from the imports of the code: rooms as boxes, an arc from each room to each that it imports.

    python docs/draw_architecture.py [--root FOLDER] [--output FILE]

A room stands above those it imports, so that every arc leads down; one that leads up closes a circle and is drawn in red. An arc
is as wide as the number of import statements behind it, which it also says. The same code gives the same bytes.
"""

import argparse
import ast
import re
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("recipes", "engine", "models", "kernels")
COLORS = (
    *("#2a5c8a", "#b4532a", "#3f7d58", "#7a4b94", "#a8842c", "#2f8a8a", "#a03c5d", "#56657a", "#6b7f2a", "#8a5a3c", "#4a4f9c"),
    *("#1f7a99", "#c0653f", "#5c7f4f", "#93569c", "#8a7430", "#3c8c72", "#b34d4d"),
)
INK, PAPER, FLOOR, ALARM = "#1d2733", "#ffffff", "#f3f5f7", "#d01c1c"
CAPTION = "An arc leads from a room down to one that it imports, a red one up; its number is that of the import statements."
WIDTH, HEIGHT, GAP = 4.6, 0.92, 0.42  # of a box, and between two; inches
# "recipes", "kernels", "engine.data"; "engine" and "models" are the modules on their top floor. One of those that imports rooms of
# its own package is a room of its own, such as "models.loading".
Room = str


def room_of(name: str, rooms: set[Room]) -> Room:
    """The room of a dotted module name."""
    two = ".".join(name.split(".")[:2])
    return two if two in rooms else name.split(".")[0]


def statements(file: Path) -> list[set[str]]:
    """The dotted names of ours that each import statement of a file asks for."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append({f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Import):
            found.append({alias.name for alias in node.names})
    return [{name for name in names if name.split(".")[0] in PACKAGES} for names in found]


def survey(root: Path) -> tuple[dict[Room, list[Path]], Counter]:
    """The files of each room, and how many import statements lead from one room to another."""
    files = {
        ".".join(f.relative_to(root).with_suffix("").parts): f
        for package in PACKAGES
        for f in sorted((root / package).rglob("*.py"))
    }
    rooms = {name.removesuffix(".__init__") for name in files if name.count(".") == 2 and name.endswith(".__init__")} | set(
        PACKAGES
    )
    inner = {room for room in rooms if "." in room}
    for name in [name for name in files if name.count(".") == 1 and name.split(".")[0] in ("engine", "models")]:
        if any(
            room_of(target, inner).startswith(f"{name.split('.')[0]}.") for names in statements(files[name]) for target in names
        ):
            rooms.add(name)
    floors, imports = {}, Counter()
    for name, file in files.items():
        source = room_of(name, rooms)
        floors.setdefault(source, []).append(file)
        for names in statements(file):
            targets = {room_of(target, rooms) for target in names} - {source}
            imports.update((source, target) for target in targets)
    return floors, imports


def in_floors(rooms: list[Room], imports: Counter) -> list[Room]:
    """From the top down: a room before those it imports, as far as no circle forbids it."""
    levels: dict[Room, int] = {}

    def level(room: Room, above: tuple[Room, ...] = ()) -> int:
        if room not in levels:
            below = [b for a, b in imports if a == room and b in rooms and b not in (*above, room)]
            levels[room] = 1 + max((level(b, (*above, room)) for b in sorted(below)), default=0)
        return levels[room]

    return sorted(rooms, key=lambda room: (-level(room), room))


def says(room: Room, files: list[Path], root: Path) -> tuple[str, str]:
    """A room's name, and what it is (the first sentence of its package); of a top floor, its modules."""
    package, _, inner = room.partition(".")
    if not inner and package in ("engine", "models"):
        return f"{package}/*.py", ", ".join(sorted(file.stem for file in files if file.stem != "__init__"))
    file = root / package / inner / "__init__.py"
    file = file if file.exists() else file.parent.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    name = f"{package}/{inner}".rstrip("/") + (".py" if file.name != "__init__.py" else "")
    return name, docstring.splitlines()[0].split(". ")[0].rstrip(".:").replace("`", "")


def wrapped(text: str, width: int, lines: int = 2) -> str:
    rows = [""]
    for word in text.split():
        if len(rows[-1]) + len(word) >= width:
            rows.append("")
        rows[-1] += f"{word} "
    return "\n".join(row.rstrip() for row in rows[:lines]) + (" ..." if len(rows) > lines else "")


def draw_box(axes, x: float, y: float, width: float, color: str, words: tuple[str, str]) -> None:
    """A room whose upper left corner is (x, y)."""
    shape = f"round,pad=0,rounding_size={HEIGHT / 8}"
    axes.add_patch(FancyBboxPatch((x, y - HEIGHT), width, HEIGHT, boxstyle=shape, fc=PAPER, ec=color, lw=1.4, zorder=3))
    axes.add_patch(Rectangle((x, y - 0.88 * HEIGHT), 0.12, 0.76 * HEIGHT, fc=color, ec="none", zorder=4))
    name, what = words
    axes.text(x + 0.27, y - 0.24, name, fontsize=12.5, fontweight="bold", color=color, va="center", zorder=5)
    axes.text(x + 0.27, y - 0.62, wrapped(what, round(13 * width)), fontsize=9, color=INK, va="center", linespacing=1.25, zorder=5)


def draw_arcs(axes, side: int, edge: dict[Room, float], tops: dict[Room, float], arcs: dict, colors: dict) -> None:
    """Arcs beside a column of boxes, each from a room to one below. `side`: 1 right, -1 left of the boxes' x `edge`.

    At a box, arcs from above end in the upper half, the nearest first, and arcs to below start in the lower half, the nearest last:
    so one encloses the other and they seldom cross.
    """
    order = sorted(tops, key=lambda room: -tops[room])
    place = {room: i for i, room in enumerate(order)}

    def port(room: Room, other: Room) -> float:
        """Where at the box of `room` the arc to or from `other` touches it."""
        others = {b if a == room else a for a, b in arcs if room in (a, b)}
        from_above = sorted((other for other in others if place[other] < place[room]), key=lambda other: -place[other])
        to_below = sorted((other for other in others if place[other] > place[room]), key=lambda other: -place[other])
        return tops[room] - HEIGHT * (0.14 + 0.72 * ((from_above + to_below).index(other) + 0.5) / len(others))

    for (source, target), number in sorted(arcs.items(), key=lambda item: -abs(place[item[0][1]] - place[item[0][0]])):
        start, end = (edge[source], port(source, target)), (edge[target], port(target, source))
        span = abs(place[target] - place[source])
        reach = side * (0.30 + 0.30 * span) + max(edge[source] * side, edge[target] * side) * side
        color = colors[source] if place[source] < place[target] else ALARM
        width = 0.7 + 0.55 * number**0.5
        curve = Curve([start, (reach, start[1]), (reach, end[1]), end], [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        axes.add_patch(PathPatch(curve, fc="none", ec=color, lw=width, alpha=0.62, capstyle="butt", zorder=1))
        middle = [(p + 3 * q + 3 * r + s) / 8 for p, q, r, s in zip(start, (reach, start[1]), (reach, end[1]), end, strict=True)]
        axes.text(*middle, str(number), fontsize=8, color=color, ha="center", va="center", zorder=6)


def draw(root: Path, output: Path) -> None:
    rooms, imports = survey(root)
    own = {
        package: in_floors([room for room in rooms if room.split(".")[0] == package], imports) for package in ("engine", "models")
    }
    colors = {room: COLORS[i % len(COLORS)] for i, room in enumerate(["recipes", *own["engine"], *own["models"], "kernels"])}
    left = {"models": 3.2, "engine": 3.2 + WIDTH + 4.6}
    right = left["engine"] + WIDTH
    rows = max(map(len, own.values()))
    bottom = -(rows + 1) * (HEIGHT + GAP) - 0.7
    y = {"recipes": 0.0, "kernels": bottom}
    for inside in own.values():
        step = (bottom + HEIGHT + 1.1 + GAP) / max(1, len(inside))  # both columns fill the height
        y |= {room: -(HEIGHT + 0.9) + step * i for i, room in enumerate(inside)}

    width, height = right + 3.6, -bottom + HEIGHT + 1.0
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "vesalius",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "sans-serif"],
        }
    ):
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottom - HEIGHT - 0.55, 0.45))
        axes.axis("off")
        for package, inside in own.items():
            low, high = y[inside[-1]] - HEIGHT - 0.22, y[inside[0]] + 0.22
            floor = FancyBboxPatch(
                (left[package] - 0.25, low),
                WIDTH + 0.5,
                high - low,
                boxstyle="round,pad=0,rounding_size=0.15",
                fc=FLOOR,
                ec="none",
                zorder=0,
            )
            axes.add_patch(floor)
        for room, files in rooms.items():
            wide = room in ("recipes", "kernels")
            x = left["models"] if wide else left[room.split(".")[0]]
            draw_box(axes, x, y[room], right - left["models"] if wide else WIDTH, colors[room], says(room, files, root))
        for package, outer in (("engine", 1), ("models", -1)):
            column = {room: y[room] for room in ("recipes", *own[package], "kernels")}
            edges = {1: left[package] + WIDTH, -1: left[package]}
            among = {(a, b): n for (a, b), n in imports.items() if a in column and b in own[package] + ["kernels"]}
            inner = {arc: n for arc, n in among.items() if arc[0] != "recipes"}
            from_recipes = {arc: n for arc, n in among.items() if arc[0] == "recipes" and arc[1] != "kernels"}
            draw_arcs(axes, outer, dict.fromkeys(column, edges[outer]), column, inner, colors)
            draw_arcs(axes, -outer, dict.fromkeys(column, edges[-outer]), column, from_recipes, colors)
        axes.text(left["models"], bottom - HEIGHT - 0.3, CAPTION, fontsize=9, color="#6b7683", va="center")
        for artist in axes.findobj():
            artist.set_clip_on(False)
        figure.savefig(output, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    output.write_text(smaller(output.read_text(encoding="utf-8")), encoding="utf-8")


def smaller(svg: str) -> str:
    """The same picture in a quarter of the bytes: whole points, classes for what is said often, no groups, hardly a space."""
    svg = re.sub(r" *\n *", "\n", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\d)\.\d+|(\d\.\d)\d+", r"\1\2", tag[0]), svg)  # and not in what the texts say
    svg = re.sub(r' font-family: [^;]*;|; stroke-linejoin: miter| transform="rotate\(-0 [^"]*"|</?g[^>]*>\n', "", svg)
    svg = re.sub(r' (d|style)="[^"]*"', lambda part: re.sub(r"(?<=[MLQC;:]) |(?<=z)\n|\n(?=[LQCz])", "", part[0]), svg)
    said = Counter(said for style in re.findall(r' style="([^"]*)"', svg) for said in style.split(";"))
    classes = {said: f"c{i}" for i, (said, times) in enumerate(said.most_common()) if times > 2}

    def classed(style: re.Match) -> str:
        parts = style[1].split(";")
        names, rest = [classes[part] for part in parts if part in classes], ";".join(p for p in parts if p not in classes)
        return (f' class="{" ".join(names)}"' if names else "") + (f' style="{rest}"' if rest else "")

    svg = re.sub(r' style="([^"]*)"', classed, svg)
    rules = f"text{{font-family: 'DejaVu Sans', sans-serif; paint-order: stroke; stroke: {PAPER}; stroke-width: 3px}}"  # a halo
    return svg.replace("</style>", rules + "".join(f".{name}{{{said}}}" for said, name in classes.items()) + "</style>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "architecture.svg", help="the picture")
    options = parser.parse_args()
    draw(options.root, options.output)
