# Each command does all its own set-up and is safe to repeat. PYTHON: 3.10 to 3.13.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo text test soak clean

demo: .venv/demo
	$(BIN)/python -m data.prepare repeats --out=data/tiny
	$(BIN)/python train.py configs/tiny.py
	$(BIN)/python eval_copy.py runs/tiny --plot runs/tiny/copy.png
	@echo "next: $(BIN)/python eval_copy.py runs/tiny/ckpt.pt --prompt 'the quick brown fox jumps. the qui'"

text: .venv/places
	$(BIN)/python -m data.prepare python-and-places --tokenizer=bpe --vocab_size=2048 --out=data/text
	$(BIN)/python train.py configs/text.py
	$(BIN)/python eval_copy.py runs/text --data=data/text --plot=runs/text/copy.png

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: .venv/test
	$(BIN)/python -m pytest -m soak

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/places: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[places]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv
