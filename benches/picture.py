"""What benches write into docs: tables in Markdown, bars in SVG."""


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def bars(title, unit, rows):
    """One group of horizontal bars; ours are dark."""
    most, parts = max(value for _, value in rows), []
    for index, (name, value) in enumerate(rows):
        y, colour = 30 + index * 22, "#1f4e79" if name.startswith("cryptattach") else "#b0b7c0"
        parts.append(f'<text x="215" y="{y + 12}" text-anchor="end">{name}</text>'
                     f'<rect x="222" y="{y}" width="{max(1, value / most * 240):.0f}" height="16" fill="{colour}"/>'
                     f'<text x="{228 + value / most * 240:.0f}" y="{y + 12}">{value:.2f}</text>')
    return f'<text x="10" y="16" font-weight="bold">{title} ({unit})</text>' + "".join(parts), 44 + len(rows) * 22


def picture(groups):
    body, y = "", 0
    for group in groups:
        drawn, height = bars(*group)
        body += f'<g transform="translate(0,{y})">{drawn}</g>'
        y += height
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="540" height="{y}" font-family="sans-serif" font-size="11" '
            f'fill="#222"><rect width="540" height="{y}" fill="#fff"/>{body}</svg>\n')
