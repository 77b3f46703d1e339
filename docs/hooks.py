"""For the documentation site: links to files that are not on it become their names."""

import re

OUTSIDE = re.compile(r"\[([^]]*)\]\((\.\./[^)#]*)[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page whose links stay on the site."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].removeprefix('../')}`)", markdown)
