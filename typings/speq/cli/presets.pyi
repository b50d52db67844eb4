from cli.presets import *
