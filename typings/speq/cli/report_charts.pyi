from cli.report_charts import *
