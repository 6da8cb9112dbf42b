# `make shipped-model`: the model that ships in the package, from the emoji font. About two and a half hours on two cores.
# Every stage that is done leaves a mark; one that was interrupted goes on where it was.

RUN := runs/shipped-model
GOES_ON = $(if $(wildcard $(RUN)/$(1).run.safetensors),--resume)
DVAE := --model.image-size 64 --model.vocab 1024 --model.widths 32 64 128 --model.blocks 1 --model.codebook-dim 64
PRIOR := --model.text-len 32 --model.layers 8 --model.heads 6 --model.head-dim 32 --model.conv-kernel 7

shipped-model: $(RUN)/prior.done $(RUN)/clip.done   ## train, pack and evaluate it
	$(BIN)/dalle export --model $(RUN) --out dalle/shipped
	$(BIN)/dalle evaluate --model dalle/shipped --data emoji --out benchmarks/results/shipped-model

$(RUN)/dvae.done: | $(DEV_STAMP)
	$(BIN)/dalle train dvae --out $(RUN) --data emoji --minutes 32 --threads 1 --batch-size 16 --lr 3e-3 \
		$(DVAE) $(call GOES_ON,dvae)
	touch $@

$(RUN)/tokens.done: $(RUN)/dvae.done
	$(BIN)/dalle tokenize --out $(RUN) --data emoji
	touch $@

$(RUN)/decoder.done: $(RUN)/dvae.done
	$(BIN)/dalle train decoder --out $(RUN) --data emoji --minutes 30 --threads 1 --batch-size 16 --lr 3e-3 \
		--widths 32 96 192 --blocks 2 $(call GOES_ON,decoder)
	touch $@

$(RUN)/clip.done: $(RUN)/decoder.done $(RUN)/tokens.done
	$(BIN)/dalle train clip --out $(RUN) --data emoji --minutes 9 --threads 1 --preset small $(call GOES_ON,clip)
	touch $@

$(RUN)/prior.done: $(RUN)/tokens.done
	$(BIN)/dalle train prior --out $(RUN) --minutes 70 --batch-size 16 --lr 2e-3 --bpe-dropout 0 \
		$(PRIOR) $(call GOES_ON,prior)
	touch $@
