"""An OpenAI-compatible server on the user's own network, which answers prompts in place of a teacher."""

from mlx_distill.endpoint.block import write_block
from mlx_distill.endpoint.network import check_server, leaves_network
from mlx_distill.endpoint.server import Server

__all__ = ["Server", "check_server", "leaves_network", "write_block"]
