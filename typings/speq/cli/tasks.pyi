from cli.tasks import *
