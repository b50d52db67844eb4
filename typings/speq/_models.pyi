from api._models import *
