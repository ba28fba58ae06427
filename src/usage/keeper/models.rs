//! Models by number: keys in memory are small.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use super::super::lease::{MeterKey, ModelKey};
use crate::model::{MeterName, ModelName};

/// The numbers of this process. Only models that a tier limits get one, so they are few.
#[derive(Default)]
pub(super) struct Models(RwLock<Known>);

#[derive(Default)]
struct Known {
    by_name: HashMap<ModelName, ModelKey>,
    /// By number, from 1 on.
    names: Vec<ModelName>,
}

impl Models {
    pub(super) fn key(&self, name: &ModelName) -> ModelKey {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = known.by_name.get(name) {
            return *key;
        }
        drop(known);
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let next = ModelKey(u32::try_from(known.names.len() + 1).expect("models are few"));
        let key = *known.by_name.entry(name.clone()).or_insert(next);
        if key == next {
            known.names.push(name.clone());
        }
        key
    }

    /// The number of a model that has one.
    pub(super) fn known(&self, name: &ModelName) -> Option<ModelKey> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.by_name.get(name).copied()
    }

    /// `None`: nothing here is of that model.
    pub(super) fn key_of(&self, meter: &MeterName) -> Option<MeterKey> {
        let model = match &meter.model {
            Some(name) => self.known(name)?,
            None => ModelKey::TOTAL,
        };
        Some(MeterKey {
            user: meter.user_id,
            period: meter.period,
            model,
        })
    }

    pub(super) fn name_of(&self, key: MeterKey) -> MeterName {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let place = (key.model.0 as usize).checked_sub(1);
        MeterName {
            user_id: key.user,
            period: key.period,
            model: place.map(|place| known.names[place].clone()),
        }
    }
}
