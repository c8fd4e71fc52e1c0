"""A site and tokens that would be markup, links or commands if a page did not escape them."""

from __future__ import annotations

from workbench.store.manifest import SiteRecord

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (32,), "float32")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    " &amp; ",
    "a\nb",
    "\u202egnp",
    "</span></div>",
    "\ud800",
    "nul\0l",
    "🦜",
    "plain",
)
