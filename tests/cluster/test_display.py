"""Tables of Markdown."""

from markdown_it import MarkdownIt

from cluster.display import markdown


def test_a_bar_in_a_cell_ends_no_cell():
    text = "\n".join(markdown(("machine", "command|s"), [("A|B", "`a | b`"), (None, 1)]))
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<td>") == 4 and html.count("<th>") == 2
    for cell in ("<th>command|s</th>", "<td>A|B</td>", "<td><code>a | b</code></td>", "<td>-</td>"):
        assert cell in html
