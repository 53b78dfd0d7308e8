//! Rules: what the schedules of some kernels are to be. Data, which a person writes, or `dsc tune`.

use super::{KernelShape, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Fields that say what is so. Where they said otherwise, results would be wrong.
const FACTS: [&str; 2] = ["near", "symbols_by_value"];
/// Largest number in a schedule.
const MOST: u64 = 1 << 16;

/// A change of the schedules of all kernels that it fits. What a condition leaves out may be anything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// The kernel's op, as [`KernelShape::op`] calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub op: Option<String>,
    /// The operation of a kernel library.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// The shape class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// Tokens that steps of the class take at most: from, to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<[u32; 2]>,
    /// [`KernelShape::n`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// [`KernelShape::k`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<u32>,
    /// [`KernelShape::heads`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<u32>,
    /// Fields of the schedule to set.
    pub schedule: Map<String, Value>,
}

impl Rule {
    /// Reads a list of rules in JSON.
    ///
    /// # Errors
    /// What is wrong with the text, or with a schedule in it.
    pub fn parse(text: &str) -> Result<Vec<Rule>, String> {
        let rules: Vec<Rule> = serde_json::from_str(text).map_err(|e| e.to_string())?;
        for rule in &rules {
            rule.apply(&Schedule::default())?;
            if let Some(fact) = FACTS.iter().find(|fact| rule.schedule.contains_key(**fact)) {
                return Err(format!("{fact} is no choice, but what the compiler knows: leave it out"));
            }
            if let Some((field, n)) = rule.schedule.iter().find(|(_, n)| n.as_u64().is_some_and(|n| n > MOST)) {
                return Err(format!("{field} of {n}: give at most {MOST}"));
            }
        }
        Ok(rules)
    }

    /// The rule for kernels of exactly that shape, in steps of at most `tokens` tokens, that turns `from` into `to`.
    pub fn of(shape: &KernelShape, tokens: u32, from: &Schedule, to: &Schedule) -> Rule {
        let fields = |s: &Schedule| match serde_json::to_value(s) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        let (from, mut to) = (fields(from), fields(to));
        // Zeros that the text leaves out.
        let dropped: Vec<String> = from.keys().filter(|key| !to.contains_key(*key)).cloned().collect();
        to.extend(dropped.into_iter().map(|key| (key, 0.into())));
        to.retain(|key, value| from.get(key) != Some(value));
        Rule {
            op: Some(shape.op.into()),
            tokens: Some([tokens; 2]),
            n: Some(shape.n),
            k: Some(shape.k),
            heads: Some(shape.heads),
            schedule: to,
            ..Rule::default()
        }
    }

    /// The schedule of such a kernel after all rules that fit it, in order. A kernel library calls its classes `operation/class`.
    pub fn applied(rules: &[Rule], schedule: Schedule, shape: &KernelShape, tokens: u32, class: &str) -> Schedule {
        let fitting = rules.iter().filter(|rule| rule.fits(shape, tokens, class));
        fitting.fold(schedule, |schedule, rule| rule.apply(&schedule).unwrap_or(schedule))
    }

    fn apply(&self, schedule: &Schedule) -> Result<Schedule, String> {
        let mut fields = serde_json::to_value(schedule).map_err(|e| e.to_string())?;
        if let Some(fields) = fields.as_object_mut() {
            fields.extend(self.schedule.clone());
        }
        serde_json::from_value(fields).map_err(|e| format!("schedule {}: {e}", Value::Object(self.schedule.clone())))
    }

    fn fits(&self, shape: &KernelShape, tokens: u32, class: &str) -> bool {
        let (operation, class) = class.split_once('/').unwrap_or(("", class));
        let named = |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|w| w == name);
        let sized = |wanted: Option<u32>, size: u32| wanted.is_none_or(|w| w == size);
        named(&self.op, shape.op)
            && named(&self.operation, operation)
            && named(&self.class, class)
            && self.tokens.is_none_or(|[from, to]| (from..=to).contains(&tokens))
            && sized(self.n, shape.n)
            && sized(self.k, shape.k)
            && sized(self.heads, shape.heads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Extent;

    fn shape() -> KernelShape {
        KernelShape { op: "attention", m: Extent::from(16), m_max: 16, n: 512, k: 2048, heads: 128, products: 1 }
    }

    #[test]
    fn a_rule_is_for_what_it_names() {
        let fits = |conditions: &str, class: &str| {
            let rules = Rule::parse(&format!(r#"[{{{conditions}"schedule": {{"tile_n": 16}}}}]"#)).expect("a rule");
            Rule::applied(&rules, Schedule::default(), &shape(), 16, class).tile_n == 16
        };
        assert!(fits("", "decode16"));
        assert!(fits(r#""op": "attention", "class": "decode16", "#, "mla_decode/decode16"));
        assert!(!fits(r#""op": "attention", "class": "decode16", "#, "decode1"));
        assert!(fits(r#""operation": "mla_decode", "#, "mla_decode/decode16"));
        assert!(!fits(r#""operation": "decode", "#, "mla_decode/decode16"));
        assert!(fits(r#""tokens": [9, 16], "n": 512, "k": 2048, "heads": 128, "#, "decode16"));
        for other in [r#""tokens": [17, 64], "#, r#""n": 64, "#, r#""k": 64, "#, r#""heads": 16, "#, r#""op": "row", "#]
        {
            assert!(!fits(other, "decode16"), "{other}");
        }
    }

    #[test]
    fn a_rule_of_two_schedules_turns_one_into_the_other() {
        let from = Schedule { tile_m: 1, tile_n: 64, tile_h: 16, ..Schedule::default() };
        let to = Schedule { tile_m: 1, tile_n: 32, cluster: 2, ..Schedule::default() };
        let rule = Rule::of(&shape(), 16, &from, &to);
        assert_eq!(serde_json::to_string(&rule.schedule).unwrap(), r#"{"cluster":2,"tile_h":0,"tile_n":32}"#);
        let text = serde_json::to_string(&[&rule]).unwrap();
        assert_eq!(Rule::parse(&text), Ok(vec![rule.clone()]));
        assert_eq!(Rule::applied(std::slice::from_ref(&rule), from.clone(), &shape(), 16, "x"), to);
        assert_eq!(Rule::applied(&[rule], from.clone(), &shape(), 17, "x"), from);
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(Rule::parse(r#"[{"schedule": {"tile_q": 16}}]"#).unwrap_err().contains("tile_q"));
        assert!(Rule::parse(r#"[{"schedul": {}}]"#).unwrap_err().contains("schedul"));
        assert!(Rule::parse("{").is_err());
        assert!(Rule::parse(r#"[{"schedule": {"near": true}}]"#).unwrap_err().contains("leave it out"));
        assert!(Rule::parse(r#"[{"schedule": {"tile_m": 65537}}]"#).unwrap_err().contains("tile_m of 65537"));
    }
}
