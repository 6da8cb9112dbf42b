# `make shipped-model`: trains the shipped model on the emoji font, in about two and a half hours on two cores.
# A complete stage leaves a .done file; an interrupted one resumes from its checkpoint.

RUN := runs/shipped-model
RESUME = $(if $(wildcard $(RUN)/$(1).run.safetensors),--resume)
DVAE := --model.image-size 64 --model.vocab 1024 --model.widths 32 64 128 --model.blocks 1 --model.codebook-dim 64
PRIOR := --model.text-len 32 --model.layers 8 --model.heads 6 --model.head-dim 32 --model.conv-kernel 7

shipped-model: $(RUN)/prior.done $(RUN)/clip.done   ## train, pack and evaluate it
	$(BIN)/dalle export --model $(RUN) --out dalle/shipped
	$(BIN)/dalle evaluate --model dalle/shipped --data emoji --out benchmarks/results/shipped-model

$(RUN)/dvae.done: | $(DEV_STAMP)
	$(BIN)/dalle train dvae --out $(RUN) --data emoji --minutes 32 --threads 1 --batch-size 16 --lr 3e-3 \
		$(DVAE) $(call RESUME,dvae)
	touch $@

$(RUN)/tokens.done: $(RUN)/dvae.done
	$(BIN)/dalle tokenize --out $(RUN) --data emoji
	touch $@

$(RUN)/decoder.done: $(RUN)/dvae.done
	$(BIN)/dalle train decoder --out $(RUN) --data emoji --minutes 30 --threads 1 --batch-size 16 --lr 3e-3 \
		--widths 32 96 192 --blocks 2 $(call RESUME,decoder)
	touch $@

$(RUN)/clip.done: $(RUN)/decoder.done $(RUN)/tokens.done
	$(BIN)/dalle train clip --out $(RUN) --data emoji --minutes 9 --threads 1 --preset small $(call RESUME,clip)
	touch $@

$(RUN)/prior.done: $(RUN)/tokens.done
	$(BIN)/dalle train prior --out $(RUN) --minutes 70 --batch-size 16 --lr 2e-3 --bpe-dropout 0 \
		$(PRIOR) $(call RESUME,prior)
	touch $@
