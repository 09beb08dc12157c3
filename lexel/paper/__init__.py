"""The paper's tables, small, on your own pictures: what `lexel tables` runs (https://arxiv.org/abs/2412.02692).

`tables.toml` beside this file names the rows: which tokenizer or generator each trains, and what was published for it.
A row is a run folder that `lexel train` could have made; rows that several tables share are trained once, what is
finished is not done again, and what was stopped goes on.
"""

from lexel.paper.plan import Table, TablesPlan, read_tables
from lexel.paper.run import TablesResult, run_tables

__all__ = ["Table", "TablesPlan", "TablesResult", "read_tables", "run_tables"]
