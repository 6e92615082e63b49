"""E12, distilabel: text generation with its OpenAI client against the same stub."""

import json
import logging
import os
import tempfile

os.environ["HOME"] = tempfile.mkdtemp()
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration
from e12_case import CONCURRENCY, PROMPTS, RECORDS, Watch, counts, server

logging.disable(logging.INFO)

if __name__ == "__main__":
    with server() as port, tempfile.TemporaryDirectory() as cache:
        with Pipeline(name="e12", cache_dir=cache) as pipeline:
            load = LoadDataFromDicts(data=[{"instruction": p} for p in PROMPTS], batch_size=500)
            llm = OpenAILLM(
                model="m",
                base_url=f"http://127.0.0.1:{port}/v1",
                api_key="none",
                max_retries=6,
            )
            ask = TextGeneration(llm=llm, input_batch_size=CONCURRENCY)
            load >> ask
        watch = Watch()
        made = pipeline.run(use_cache=False)
        seconds = watch.seconds()
        rows = sum(1 for row in made["default"]["train"] if row["generation"])
        print(json.dumps({"rate": RECORDS / seconds, "kept": rows, **counts(port)}))
