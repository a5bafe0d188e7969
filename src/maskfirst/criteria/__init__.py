"""Criteria: how truth meets proposals, one a file; `build.MENUS` lists them."""
