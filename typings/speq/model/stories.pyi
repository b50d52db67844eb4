from model.stories import *
