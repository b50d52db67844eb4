from model.function_tables import *
