"""The whole story on embedded drawings: two tokenizers that differ in the quantizer alone, tokens, a generator, a page.

The folder that `demo` writes holds ordinary runs (`vq`, `tokenizer`, `generator`) and an ordinary token set, each to be
used with the other commands; `report.html` shows them side by side.
"""

from lexel.demo.story import DemoResult, demo

__all__ = ["DemoResult", "demo"]
