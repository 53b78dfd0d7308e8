//! What is known of integers while a function is written: bounds, and what they are made of. Tests that always hold are folded by it, as bounds of
//! views are where tiles divide them, and numbers of elements are taken apart without divisions.

use super::mlir::{Ty, Val};
use std::collections::{HashMap, HashSet};

/// How an integer was made.
#[derive(Clone, Copy)]
enum Made {
    Sum(Val, Val),
    Product(Val, i64),
    /// A truth value: whether the first, if it is not negative, is less than the second.
    Less(Val, i64),
}

/// What is known of a function's values.
#[derive(Default)]
pub struct Known {
    below: HashMap<Val, i64>,
    made: HashMap<Val, Made>,
    less: HashSet<(Val, Val)>,
}

impl Known {
    /// A bound that a value is below; it is not negative then.
    pub fn below(&self, v: Val) -> Option<i64> {
        match v {
            Val::Int(n, _) => (n >= 0).then_some(n + 1),
            _ => self.below.get(&v).copied(),
        }
    }

    /// Notes that `0 <= v < n`.
    pub fn set_below(&mut self, v: Val, n: i64) {
        let most = if v.ty() == Ty::I64 { i64::MAX } else { 1 << 31 };
        if matches!(v, Val::Reg(..)) && (1..=most).contains(&n) {
            let known = self.below.entry(v).or_insert(n);
            *known = n.min(*known);
        }
    }

    /// Notes that `0 <= a < b`.
    pub fn set_less(&mut self, a: Val, b: Val) {
        self.less.insert((a, b));
    }

    /// Whether a test of integers is known to hold, or not to.
    pub fn test(&self, how: &str, a: Val, b: Val) -> Option<bool> {
        if !matches!(how, "slt" | "ult") {
            return None;
        }
        if self.less.contains(&(a, b)) || self.below(a)? <= b.int()? {
            return Some(true);
        }
        None
    }

    /// `v` is `a + b`.
    pub fn sum(&mut self, v: Val, a: Val, b: Val) {
        if let (Some(x), Some(y)) = (self.below(a), self.below(b)) {
            let Some(below) = x.checked_add(y - 1).filter(|&n| fits(v, n)) else { return };
            self.set_below(v, below);
            self.made.insert(v, Made::Sum(a, b));
        }
    }

    /// `v` is `a * n`.
    pub fn product(&mut self, v: Val, a: Val, n: i64) {
        if let Some(x) = self.below(a)
            && n > 0
            && let Some(below) = (x - 1).checked_mul(n).and_then(|most| most.checked_add(1)).filter(|&n| fits(v, n))
        {
            self.set_below(v, below);
            self.made.insert(v, Made::Product(a, n));
        }
    }

    /// `v` is `a / n`.
    pub fn quotient(&mut self, v: Val, a: Val, n: i64) {
        if let Some(x) = self.below(a) {
            self.set_below(v, (x - 1) / n + 1);
        }
    }

    /// `v` is `a`, of another type or for all lanes.
    pub fn same(&mut self, v: Val, a: Val) {
        if let Some(n) = self.below(a) {
            self.set_below(v, n);
        }
    }

    /// `v` is one of two.
    pub fn choice(&mut self, v: Val, c: Val, a: Val, b: Val) {
        let chosen = match self.made.get(&c) {
            Some(&Made::Less(x, n)) if x == a => Some(n),
            _ => self.below(a),
        };
        if let (Some(x), Some(y)) = (chosen, self.below(b)) {
            self.set_below(v, x.max(y));
        }
    }

    /// `v` says whether `a < b`.
    pub fn compared(&mut self, v: Val, how: &str, a: Val, b: Val) {
        if let Some(n) = b.int()
            && n > 0
            && (how == "ult" || how == "slt" && self.below(a).is_some())
        {
            self.made.insert(v, Made::Less(a, n));
        }
    }

    /// Whether a value is a multiple of `n`: the quotient, as a factor of a value.
    fn multiple(&self, v: Val, n: i64) -> Option<(Val, i64)> {
        match (v, self.made.get(&v)) {
            (Val::Int(x, ty), _) if x >= 0 && x % n == 0 => Some((Val::Int(x / n, ty), 1)),
            (_, Some(&Made::Product(u, k))) if k % n == 0 => Some((u, k / n)),
            _ => None,
        }
    }

    /// A value by `n`: the quotient's terms, each a value and its factor, and the rest. None if it takes a division.
    pub fn split(&self, v: Val, n: i64) -> Option<(Vec<(Val, i64)>, Val)> {
        if self.below(v)? <= n {
            return Some((Vec::new(), v));
        }
        if let Some(term) = self.multiple(v, n) {
            return Some((vec![term], Val::Int(0, v.ty())));
        }
        let Some(&Made::Sum(a, b)) = self.made.get(&v) else { return None };
        let (term, rest) = match (self.multiple(a, n), self.multiple(b, n)) {
            (Some(term), _) => (term, b),
            (_, Some(term)) => (term, a),
            _ => return None,
        };
        let (mut terms, rest) = self.split(rest, n)?;
        terms.push(term);
        Some((terms, rest))
    }
}

/// Whether all below `n` are values of the type as they are.
fn fits(v: Val, n: i64) -> bool {
    v.ty() == Ty::I64 || n <= 1 << 31
}

#[cfg(test)]
mod tests {
    use super::super::mlir::{Fn, i32};
    use super::*;

    fn function() -> (Fn, Val) {
        let mut f = Fn::default();
        f.known = Some(Known::default());
        let thread = f.op("thread", Ty::I32);
        f.set_below(thread, 256);
        (f, thread)
    }

    #[test]
    fn bounds_that_hold_are_folded() {
        let (mut f, thread) = function();
        let row = f.div(thread, 8);
        let row = f.add(row, i32(96));
        assert_eq!(f.cmp("ult", row, i32(128)).int(), Some(1));
        assert_eq!(f.cmp("slt", row, i32(127)).int(), None);
        let unknown = f.op("unknown", Ty::I32);
        let sum = f.add(row, unknown);
        assert_eq!(f.cmp("ult", sum, i32(1 << 30)).int(), None);
        let high = f.mul(row, i32(1 << 25));
        assert_eq!(f.cmp("slt", high, i32(i64::from(i32::MAX))).int(), None, "it may be negative");
    }

    #[test]
    fn what_holds_in_a_loop_need_not_behind_it() {
        for asks_last in [false, true] {
            let (mut f, thread) = function();
            f.asks_last = asks_last;
            let l = f.open_loop(thread, i32(2048), &[]);
            f.bound_counter(&l, 256, 2304);
            assert_eq!(f.cmp("slt", l.args[0], i32(256)).int(), asks_last.then_some(1));
            f.close_loop(&l, i32(2048), &[]);
            assert_eq!(f.cmp("slt", l.done[0], i32(2048)).int(), None);
            assert_eq!(f.cmp("slt", l.done[0], i32(2304)).int(), Some(1));
        }
    }

    #[test]
    fn what_is_chosen_is_below_what_was_asked() {
        let (mut f, thread) = function();
        let ok = f.cmp("slt", thread, i32(100));
        let clamped = f.select(ok, thread, i32(0));
        assert_eq!(f.cmp("ult", clamped, i32(100)).int(), Some(1));
        let other = f.select(ok, thread, i32(200));
        assert_eq!(f.cmp("ult", other, i32(200)).int(), None);
        assert_eq!(f.cmp("ult", other, i32(201)).int(), Some(1));
    }

    #[test]
    fn numbers_of_elements_are_taken_apart() {
        let (mut f, thread) = function();
        let row = f.op("row", Ty::I32);
        f.set_below(row, 1000);
        let first = f.mul(row, i32(256));
        let number = f.add(first, thread);
        let number = f.add(number, i32(512));
        assert_eq!(f.rem(number, 256), thread);
        let quotient = f.div(number, 256);
        assert_eq!(f.known.as_ref().and_then(|k| k.below(quotient)), Some(1002));
        // By 96 it takes a division.
        assert_ne!(f.rem(number, 96), thread);
    }
}
