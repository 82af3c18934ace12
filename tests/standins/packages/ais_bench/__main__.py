import runpy

runpy.run_module("ais_bench.infer", run_name="__main__", alter_sys=True)
