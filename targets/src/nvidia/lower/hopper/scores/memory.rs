//! The kernel around the roles, and its shared memory.

use super::super::config::{ROWS, WARPGROUP};
use super::super::contraction::STEP_BYTES;
use super::super::loops::ALL_ROWS;
use super::super::plan::two_roles;
use super::{Planner, REGISTERS, REGISTERS_IN_TURNS};
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::{Block, Buffer, BufferId, Channel, Scheduled};

impl Planner<'_> {
    pub(super) fn scheduled(mut self) -> Option<Scheduled> {
        let mut names = self.values.names.clone();
        let producer = self.role(&self.program.body, true, &mut names)?;
        let mut names = self.values.names.clone();
        let consumer = self.role(&self.program.body, false, &mut names)?;
        let turns = self.config.turns;
        let warps = self.config.warpgroups * turns * WARPGROUP / Arch::WARP;
        let redistributed = self.config.warpgroups * turns > 1;
        let registers = if turns > 1 { REGISTERS_IN_TURNS } else { REGISTERS };
        // Of many tokens the later see more columns; few are of many sequences, which see whatever they have.
        let folded = self.config.warpgroups == 2 && self.program.grid.len() == 2;
        let (produces, consumes) =
            if redistributed { ([0, 4], [4, 4 + warps]) } else { ([warps, warps + 1], [0, warps]) };
        let registers = redistributed.then_some(registers);
        let roles = two_roles([(produces, producer), (consumes, consumer)], registers, true);
        let (buffers, [residents, slots]) = self.buffers();
        let [ahead, depth] = self.config.stages;
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            // Neighbours share the resident operand.
            persistent: Some(if folded { 1 } else { ALL_ROWS }),
            folded,
            cluster: None,
            team: 1,
            alternate: false,
            dies: 1,
            params: self.values.params,
            threads: produces[1].max(consumes[1]) * Arch::WARP,
            buffers,
            channels: vec![
                Channel { name: "resident".into(), stages: ahead, turns: 1, slots: residents },
                Channel { name: "stream".into(), stages: depth, turns, slots },
            ],
            types: self.values.types,
            places: self.values.places,
            common: Block::default(),
            roles,
        })
    }

    /// Buffers, and those of a stage of each ring.
    fn buffers(&self) -> (Vec<Buffer>, [Vec<BufferId>; 2]) {
        let c = &self.config;
        let columns = STEP_BYTES / self.p.dtype.bytes() as u32;
        let operand = |name: &str, bytes: u32, copies: u32| Buffer {
            name: name.into(),
            dtype: self.p.dtype,
            shape: [bytes / STEP_BYTES, columns],
            pitch: STEP_BYTES,
            swizzle: STEP_BYTES,
            copies,
            offset: 0,
            outside: false,
        };
        let plain = |name: &str, dtype: DType, shape: [u32; 2], copies: u32| Buffer {
            name: name.into(),
            dtype,
            shape,
            pitch: shape[1] * 4,
            swizzle: 0,
            copies,
            offset: 0,
            outside: false,
        };
        let [ahead, depth] = c.stages;
        let rows = c.resident / STEP_BYTES;
        let each = c.resident / self.p.residents.len() as u32;
        let mut buffers: Vec<Buffer> = self.p.residents.iter().map(|_| operand("resident", each, ahead)).collect();
        let streamed = buffers.len() as u32;
        buffers.push(operand("streamed", c.streamed, depth));
        buffers.extend(self.p.streamed[1..].iter().map(|_| plain("vector", DType::F32, [1, ROWS], depth)));
        let columns = buffers.len() as u32;
        buffers.extend(self.p.columns.iter().map(|i| {
            let last = self.program.tile(i.results[0]).and_then(|t| t.shape.last().copied()).unwrap_or(1);
            plain("column", DType::F32, [rows / last, last], ahead)
        }));
        let end = buffers.len() as u32;
        if c.lists > 0 {
            buffers.push(plain("lists", DType::I32, [1, c.lists / 4], 1));
        }
        let shared = self.p.weights.iter().filter(|_| c.shares_weights);
        buffers.extend(shared.map(|_| plain("weights", DType::F32, [rows, 1], 1)));
        let mut from = 0;
        for buffer in &mut buffers {
            buffer.offset = from;
            from += buffer.bytes();
        }
        let residents = (0..streamed).chain(columns..end).map(BufferId).collect();
        (buffers, [residents, (streamed..columns).map(BufferId).collect()])
    }
}
