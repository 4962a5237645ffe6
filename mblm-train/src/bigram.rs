//! A stand-in for tests: the logits of a byte are a row of a table, picked by the byte before.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{D, Device, Tensor};
use mblm_core::config::MblmConfig;
use mblm_core::mode::stream;
use mblm_core::model::Sequences;
use mblm_core::ops::dropout::dropout_composed;
use mblm_core::param::Part;
use mblm_core::{Init, Mode, ParamStore};

use crate::config::{IoSection, LossAverage, ModelConfig, Params, RunConfig, TargetStrategy, TrainSection};
use crate::model::{Loss, TrainModel};

pub const VOCABULARY: usize = 8;

type Hook = Box<dyn Fn(u64)>;

pub struct Bigram {
    pub params: ParamStore,
    /// Training passes so far.
    passes: AtomicU64,
    /// The training pass, counted from 0, whose loss is multiplied by the number.
    pub spoiled: Option<(u64, f64)>,
    /// The training pass that finds no memory.
    pub full: Option<u64>,
    /// The token that is no target.
    pub pad: Option<u32>,
    /// The share of logits that training drops.
    pub dropout: f32,
    /// Called with each training pass's number.
    pub hook: Option<Hook>,
    /// Called before each evaluation.
    pub eval_hook: Option<Box<dyn Fn()>>,
}

impl Bigram {
    pub fn new() -> Self {
        let mut params = ParamStore::new(3);
        let mut root = params.root();
        root.of(Part::Stage(0)).weight("table.weight", &[VOCABULARY, VOCABULARY], Init::Normal).unwrap();
        params.root().param("bias", &[VOCABULARY], Init::Const(0.0)).unwrap();
        Bigram {
            params,
            passes: AtomicU64::new(0),
            spoiled: None,
            full: None,
            pad: None,
            dropout: 0.2,
            hook: None,
            eval_hook: None,
        }
    }

    pub fn weights(&self) -> Vec<u32> {
        self.params.iter().flat_map(|p| p.values().iter().map(|v| v.to_bits()).collect::<Vec<_>>()).collect()
    }
}

impl TrainModel for Bigram {
    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<Loss> {
        let seq_len = sequences.len;
        if seq_len > 64 {
            return Err(mblm_core::Error::Input(format!("{seq_len} bytes, expected at most 64")));
        }
        let ids = Tensor::from_slice(sequences.ids, (sequences.batch(), seq_len), &Device::Cpu)?;
        let inputs = ids.narrow(1, 0, seq_len - 1)?.flatten_all()?;
        let targets = ids.narrow(1, 1, seq_len - 1)?.flatten_all()?.unsqueeze(1)?;
        let param = |name: &str| self.params.get(name).unwrap().tensor(mode);
        let mut logits = param("table.weight").index_select(&inputs, 0)?.broadcast_add(&param("bias"))?;
        if let Some(dropout) = mode.dropout(self.dropout, stream("bigram")) {
            logits = dropout_composed(&logits, Some(dropout))?;
        }
        let right = logits.gather(&targets, D::Minus1)?.squeeze(1)?;
        let losses = (logits.log_sum_exp(1)? - right)?;
        // The pad token is no target.
        let ids = targets.flatten_all()?.to_vec1::<u32>()?;
        let weights: Vec<f32> = ids.iter().map(|id| f32::from(Some(*id) != self.pad)).collect();
        let count = weights.iter().filter(|weight| **weight > 0.0).count();
        if count == 0 {
            return Ok((Tensor::new(0f32, &Device::Cpu)?, 0).into());
        }
        let loss = ((losses * Tensor::from_vec(weights, ids.len(), &Device::Cpu)?)?.sum_all()? / count as f64)?;
        if mode == Mode::Eval {
            self.eval_hook.iter().for_each(|hook| hook());
            return Ok((loss, count).into());
        }
        let pass = self.passes.fetch_add(1, Ordering::Relaxed);
        self.hook.iter().for_each(|hook| hook(pass));
        if self.full == Some(pass) {
            return Err(candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY".into()).into());
        }
        match self.spoiled {
            Some((spoiled, factor)) if spoiled == pass => Ok(((loss * factor)?, count).into()),
            _ => Ok((loss, count).into()),
        }
    }
}

impl TrainModel for &Bigram {
    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<Loss> {
        Bigram::loss(self, sequences, mode)
    }
}

/// A run of 20 batches with accumulation, clipping, shuffling and several epochs.
pub fn model(num_tokens: usize) -> ModelConfig {
    ModelConfig::Generative(MblmConfig {
        num_tokens,
        pad_token_id: num_tokens,
        hidden_dims: vec![],
        num_layers: vec![],
        seq_lens: vec![],
        train_checkpoint_chunks: None,
        patching: vec![],
        blocks: vec![],
    })
}

pub fn config() -> RunConfig {
    RunConfig {
        params: Params { model: model(VOCABULARY), input_seq_len: 16 },
        train: TrainSection {
            device: Default::default(),
            target_elements: 20 * 4 * 16,
            target_elements_strategy: TargetStrategy::Sequence,
            warmup_steps_perc: 0.1,
            batch_size: 4,
            shuffle_train: true,
            shuffle_eval: false,
            max_eval_steps: None,
            learning_rate: 0.1,
            gradient_clipping: Some(0.5),
            lr_scale: None,
            optimizer: Default::default(),
            schedule: Default::default(),
            decay_steps_perc: 0.2,
            gradient_accumulate_every: 3,
            loss_average: LossAverage::Window,
            rewarm_steps_perc: None,
            masking_proba: None,
            weight_decay: 0.01,
            betas: (0.9, 0.95),
            precision: Default::default(),
            validate_every: None,
            early_stop: None,
            max_seconds: None,
            seed: 11,
        },
        io: IoSection {
            name_model: "bigram".into(),
            output_dir: "unset".into(),
            dataset_dir: "unset".into(),
            dataset_id: "bytes".into(),
            dataset_args: None,
            num_models_to_save: 2,
            validate_amount: 4,
            log_train_loss_amount: 20,
            enabled_loss_log_for_gpus: None,
            description: None,
        },
        resume: None,
    }
}
