"""Flow and diffusion over latents (DiT, SiT)."""

from lexel.generators.flow.generator import Flow, FlowConfig

__all__ = ["Flow", "FlowConfig"]
