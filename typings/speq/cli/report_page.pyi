from cli.report_page import *
