"""Draws figures/slot.svg, the picture at the top of README.md: one slot of MoLEx (Eq. 4).

python figures/draw_slot.py
"""

from pathlib import Path

T, t, j = 6, 3, 1  # layers in the picture, the slot that is shown, the layer that it borrows
STYLE = """
  text { font: 15px sans-serif; fill: #1f2328; text-anchor: middle; dominant-baseline: middle }
  .small { font-size: 12px } .left { text-anchor: start }
  rect, circle { fill: #ffffff; stroke: #57606a; stroke-width: 1.4 }
  path { fill: none; stroke: #57606a; stroke-width: 1.6; marker-end: url(#tip) }
  polygon { fill: #57606a }
  .own { fill: #ddf4ff; stroke: #0969da } .borrowed { fill: #fff1e5; stroke: #bc4c00 }
  .same { stroke: #bc4c00; stroke-dasharray: 5 4; marker-end: none }
  .choice { stroke: #8250df; stroke-dasharray: 2 3 } .gate { fill: #fbefff; stroke: #8250df }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } rect, circle { fill: #0d1117; stroke: #8b949e }
    path { stroke: #8b949e } polygon { fill: #8b949e }
    .own { fill: #0c2d6b; stroke: #58a6ff } .borrowed { fill: #5a1e02; stroke: #f0883e }
    .same { stroke: #f0883e } .choice { stroke: #bc8cff } .gate { fill: #3c1e70; stroke: #bc8cff }
  }"""


def box(x: int, y: int, text: str, kind: str = "", wide: int = 120) -> str:
    shape = (
        f'<rect class="{kind}" x="{x - wide // 2}" y="{y - 17}" width="{wide}" height="34" rx="6"/>'
    )
    return f'{shape}<text x="{x}" y="{y}">{text}</text>'


def line(way: str, kind: str = "") -> str:
    return f'<path class="{kind}" d="{way}"/>'


def word(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>'


def level(i: int) -> int:
    """Where layer i stands: y grows downwards, layers are counted from below."""
    return 330 - 52 * i


def stack() -> list[str]:
    """The pretrained model: T layers."""
    parts = [word(80, 24, "pretrained model", "small")]
    for i in range(T):
        parts.append(box(80, level(i), f"layer {i}", {t: "own", j: "borrowed"}.get(i, "")))
        parts.append(line(f"M80 {level(i) + 34} V{level(i) + 19}"))
    return parts


def slot() -> list[str]:
    """z_t goes past all layers, through the slot's own and through the one that the gate picks."""
    borrowed, own, past, bus, top = 330, 455, 580, 352, 104
    return [
        word(455, 24, f"slot {t} of MoLEx", "small"),
        word(past, 380, f"z_{t}"),
        line(f"M{past} 368 V{top + 21}"),
        line(f"M{past} {bus} H{own} V{level(t) + 19}"),
        line(f"M{own} {bus} H{borrowed} V{level(j) + 19}"),
        line(f"M{borrowed} {bus} H272"),
        box(229, bus, "gate", "gate", 84),
        line(f"M229 {bus - 17} V{level(j) + 9} H142", "choice"),
        line(f"M140 {level(j) - 7} H{borrowed - 60}", "same"),
        line(f"M140 {level(t)} H{own - 60}", "same"),
        word(205, level(j) - 18, "shared weights", "small"),
        word(205, level(t) - 11, "shared weights", "small"),
        box(borrowed, level(j), f"layer {j}", "borrowed"),
        box(own, level(t), f"layer {t}", "own"),
        line(f"M{borrowed} {level(j) - 17} V{top} H{past - 21}"),
        line(f"M{own} {level(t) - 17} V{top + 2}"),
        word(borrowed + 8, 215, f"(1 - α) u_{j}", "small left"),
        word(own + 8, 131, f"α u_{t}", "small left"),
        word(past + 8, 250, f"z_{t}", "small left"),
        f'<circle cx="{past}" cy="{top}" r="19"/>',
        word(past, top, "+"),
        line(f"M{past} {top - 19} V66"),
        word(past, 52, f"z_{t + 1}"),
    ]


def main() -> None:
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    tip = f'<defs>{tip} orient="auto"><polygon points="0,0 8,4 0,8"/></marker></defs>'
    size = 'viewBox="0 0 640 400" width="640" height="400"'
    text = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", tip]
    text += [*stack(), *slot(), "</svg>"]
    Path(__file__).with_name("slot.svg").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
