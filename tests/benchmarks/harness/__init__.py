"""One harness for all benchmarks: scenarios as data, samples in files, tables and charts made from these.

benchmark   what is measured: quantities, scenarios, and how one sample is taken
samples     the file of a run: machine, versions, commit, and one line for each sample
run         takes the samples, interleaved, with the time left; a killed run is resumed
intervals   medians and ratios of medians with bootstrap intervals
report      Markdown tables and charts, comparison of two runs, tables in READMEs
"""
