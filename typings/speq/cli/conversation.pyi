from cli.conversation import *
