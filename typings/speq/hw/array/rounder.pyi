from hw.array.rounder import *
