from api._generation import *
