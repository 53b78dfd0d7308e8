//! The fields of a JSON object, read with every problem noted.

use super::Problem;
use serde_json::{Map, Value};
use std::cell::RefCell;

/// Largest vocabulary, context or scale block.
pub(super) const MAX_DIM: usize = 1 << 24;

/// The fields of one JSON object, and the list of what is wrong with them.
pub(super) struct Fields<'a> {
    pub(super) object: &'a Map<String, Value>,
    /// Written before a field's name in a problem: empty, or `rope_scaling.`.
    pub(super) place: String,
    pub(super) problems: &'a RefCell<Vec<Problem>>,
}

impl<'a> Fields<'a> {
    /// The field's value; `null` counts as absent.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn problem(&self, field: &str, expected: impl Into<String>) {
        const SHOWN: usize = 60;
        let text = self.object.get(field).map_or_else(|| "absent".to_string(), Value::to_string);
        let mut value: String = text.chars().take(SHOWN).collect();
        if value.len() < text.len() {
            value.push('…');
        }
        let field = format!("{}{field}", self.place);
        self.problems.borrow_mut().push(Problem { field, value, expected: expected.into() });
    }

    /// A required whole number; `None` marks a problem.
    pub(super) fn whole(&self, field: &str, least: usize, most: usize) -> Option<usize> {
        let value = self.get(field).and_then(Value::as_u64).and_then(|value| usize::try_from(value).ok());
        let fits = value.filter(|value| (least..=most).contains(value));
        if fits.is_none() {
            self.problem(field, format!("must be a whole number from {least} to {most}"));
        }
        fits
    }

    /// A required size from 1 to `most`; 0 marks a problem.
    pub(super) fn size(&self, field: &str, most: usize) -> usize {
        self.whole(field, 1, most).unwrap_or(0)
    }

    /// [`Fields::size`], with a default when absent.
    pub(super) fn size_or(&self, field: &str, default: usize, most: usize) -> usize {
        if self.get(field).is_none() { default } else { self.size(field, most) }
    }

    /// A required size of a tensor; 0 marks a problem.
    pub(super) fn dim(&self, field: &str) -> usize {
        self.size(field, MAX_DIM)
    }

    /// A number from 0 to `most`, with a default when absent.
    pub(super) fn count_or(&self, field: &str, default: usize, most: usize) -> usize {
        if self.get(field).is_none() { default } else { self.whole(field, 0, most).unwrap_or(default) }
    }

    /// A required number above 0 that is a normal f32 too; 0 marks a problem.
    pub(super) fn positive(&self, field: &str) -> f64 {
        let usable = |number: &f64| *number > 0.0 && (*number as f32).is_normal();
        self.get(field).and_then(Value::as_f64).filter(usable).unwrap_or_else(|| {
            self.problem(field, "must be a number above 0, within the range of f32");
            0.0
        })
    }

    /// [`Fields::positive`], with a default when absent.
    pub(super) fn positive_or(&self, field: &str, default: f64) -> f64 {
        if self.get(field).is_none() { default } else { self.positive(field) }
    }

    pub(super) fn flag_or(&self, field: &str, default: bool) -> bool {
        let Some(value) = self.get(field) else {
            return default;
        };
        value.as_bool().unwrap_or_else(|| {
            self.problem(field, "must be true or false");
            default
        })
    }

    /// An optional flag of which one value is implemented.
    pub(super) fn must_be(&self, field: &str, supported: bool, why: &str) {
        if self.get(field).is_some_and(|value| value.as_bool() != Some(supported)) {
            self.problem(field, format!("only {supported} is supported: {why}"));
        }
    }

    /// An optional name of which some values are implemented.
    pub(super) fn one_of(&self, field: &str, supported: &[&str]) {
        let known = |value: &Value| value.as_str().is_some_and(|name| supported.contains(&name));
        if self.get(field).is_some_and(|value| !known(value)) {
            let names: Vec<String> = supported.iter().map(|name| format!("{name:?}")).collect();
            self.problem(field, format!("supported: {}", names.join(", ")));
        }
    }

    /// An optional list with one of the given names for each layer.
    pub(super) fn layer_list<T: Copy>(&self, field: &str, layers: usize, names: &[(&str, T)]) -> Option<Vec<T>> {
        let kind = |value: &Value| names.iter().find(|(name, _)| value.as_str() == Some(name)).map(|(_, kind)| *kind);
        let value = self.get(field)?;
        let kinds: Option<Vec<T>> = value.as_array().and_then(|entries| entries.iter().map(kind).collect());
        let fits = kinds.filter(|kinds| kinds.len() == layers);
        if fits.is_none() && layers > 0 {
            let names: Vec<String> = names.iter().map(|(name, _)| format!("{name:?}")).collect();
            self.problem(field, format!("must be {layers} of {}, one a layer", names.join(" or ")));
        }
        fits
    }

    /// An optional object inside this one.
    pub(super) fn nested(&self, field: &str) -> Option<Fields<'a>> {
        let value = self.get(field)?;
        let Some(object) = value.as_object() else {
            self.problem(field, "must be an object");
            return None;
        };
        Some(Fields { object, place: format!("{}{field}.", self.place), problems: self.problems })
    }

    /// An optional token id, or list of them, each below `vocab`.
    pub(super) fn token_ids(&self, field: &str, vocab: usize) -> Vec<u32> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok().filter(|id| vocab == 0 || (*id as usize) < vocab);
        let ids: Option<Vec<u32>> = match self.get(field) {
            None => return Vec::new(),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.unwrap_or_else(|| {
            self.problem(field, format!("must be token ids below `vocab_size`, {vocab}"));
            Vec::new()
        })
    }
}
