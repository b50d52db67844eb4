from hw.common.files import *
