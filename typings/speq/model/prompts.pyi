from model.prompts import *
