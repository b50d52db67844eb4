from model.loaders.json_file import *
