"""A page in the browser that shows what a trained network sees: `ecanet app RUN`.

Read downward: `page` (the page, by gradio), `answers` (what the network says of one image, with its gates and without).
"""

from ecanet.studies.app.page import load_gradio, run

__all__ = ["load_gradio", "run"]
